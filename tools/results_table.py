"""Writes the results section of README.md from the committed benches, tuned/*/bench.csv. ``--check`` only compares.

Each bench's summary stands with the GPU, date and versions that its dispatch table records.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from marlin_gen.bench import BenchRow, read_csv, summarise  # noqa: E402
from marlin_gen.cost_model import attainable_tflops  # noqa: E402
from marlin_gen.table import DispatchTable  # noqa: E402

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def results(tuned: Path) -> str:
    """The markdown of every bench below ``tuned``, GPUs in order of their folders' names."""
    sections = [_section(path) for path in sorted(tuned.glob("*/bench.csv"))]
    return "\n\n".join(sections) or "No bench is committed yet."


def _section(path: Path) -> str:
    table = DispatchTable.load(path.parent)
    if table is None:
        raise ValueError(f"{path} has no usable table.json beside it; tune again, or remove the bench")
    rows = read_csv(path)
    tflops = attainable_tflops(table.gpu)
    lines = [
        f"**{table.gpu.name}** ({_provenance(table)}). {_what(rows)} [Every cell](tuned/{path.parent.name}/bench.csv).",
        "",
        "| regime | cells | speedup over cuBLAS fp16 | worst cell | fraction of the roofline | worst cell |",
        "|---|---|---|---|---|---|",
    ]
    for row in summarise(rows, tflops):
        lines.append(
            f"| {row.regime} | {row.cells} | {row.speedup:.2f}x | {row.worst_speedup:.2f}x"
            f" | {row.roofline:.2f} | {row.worst_roofline:.2f} |"
        )
    worst = max(row.relative_error for row in rows)
    lines += [
        "",
        "Means are geometric. Roofline: the longer of a plain read of the packed bytes, launch included,"
        f" and 2mnk at {tflops:.0f} TFLOP/s. Largest relative error: {worst:.1e}.",
    ]
    return "\n".join(lines)


def _what(rows: list[BenchRow]) -> str:
    shapes = ", ".join(f"{n}x{k}" for n, k in sorted({(row.n, row.k) for row in rows}))
    tokens = sorted({row.m for row in rows})
    return f"n x k = {shapes}; m = {tokens[0]} to {tokens[-1]}."


def _provenance(table: DispatchTable) -> str:
    """Date and versions of the newest tuning run that the table records."""
    run = table.runs[-1] if table.runs else {}
    words = [str(run[name]) if name == "date" else f"{name} {run[name]}" for name in sorted(run, key=_date_first)]
    return ", ".join(words) or table.gpu.slug


def _date_first(name: str) -> tuple[bool, str]:
    return name != "date", name


def inserted(readme: str, text: str) -> str:
    """``readme`` with ``text`` between the markers; a ValueError when they are not there, once each and in order."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in tail or END in tail:
        raise ValueError(f"README.md must hold {BEGIN} and, after it, {END}, once each")
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


def main(arguments: list[str]) -> int:
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = inserted(old, results(ROOT / "tuned"))
    if "--check" in arguments:
        if new != old:
            print("README.md differs from the committed benches; run python tools/results_table.py", file=sys.stderr)
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
