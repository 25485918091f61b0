"""Writes the results section of README.md and its pictures from the committed benches, tuned/*/bench.csv.

Each bench's summary stands with the GPU, date and versions that its dispatch table records. ``--check`` only compares:
the text with the benches, and what each picture says it was drawn from with the files that are there.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from marlin_gen.bench import BenchRow, read_csv, summarise  # noqa: E402
from marlin_gen.cost_model import attainable_tflops  # noqa: E402
from marlin_gen.report.data import load_gpu, provenance, sources  # noqa: E402
from marlin_gen.report.pictures import README_PICTURES, shown  # noqa: E402
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
        f"**{table.gpu.name}** (newest tune of the table: {provenance(table)}). {_what(rows)}"
        f" [Every cell](tuned/{path.parent.name}/bench.csv).",
        "",
        "| regime | cells | speedup over cuBLAS fp16 | worst cell | fraction of the roofline | worst cell"
        " | chained | worst cell |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summarise(rows, tflops):
        lines.append(
            f"| {row.regime} | {row.cells} | {row.speedup:.2f}x | {row.worst_speedup:.2f}x"
            f" | {row.roofline:.2f} | {row.worst_roofline:.2f} | {row.chained:.2f} | {row.worst_chained:.2f} |"
        )
    worst = max(row.relative_error for row in rows)
    lines += [
        "",
        "Means are geometric. Roofline: the longer of a plain read of the packed bytes, launch included,"
        f" and 2mnk at {tflops:.0f} TFLOP/s, a reference that large products on a rested card exceed. Chained: one call"
        " behind another as the op launches them, each starting while the one before it ends; others: plain launches."
        f" Largest relative error: {worst:.1e}.",
        "",
    ]
    folder = f"tuned/{path.parent.name}"
    for picture in README_PICTURES:
        lines.append(f'<img src="{folder}/{picture.name}.png" width="640" alt="{picture.alt}, {table.gpu.name}">')
    return "\n".join(lines)


def _what(rows: list[BenchRow]) -> str:
    shapes = ", ".join(f"{n}x{k}" for n, k in sorted({(row.n, row.k) for row in rows}))
    tokens = sorted({row.m for row in rows})
    return f"n x k = {shapes}; m = {tokens[0]} to {tokens[-1]}."


def stale_pictures(tuned: Path) -> list[Path]:
    """Pictures that are missing, or were drawn from other files than those beside them."""
    wanted = [bench.with_name(f"{p.name}.png") for bench in sorted(tuned.glob("*/bench.csv")) for p in README_PICTURES]
    return [path for path in wanted if not path.exists() or shown(path) != sources(path.parent)]


def draw(tuned: Path) -> None:
    """Write the README's pictures of every bench below ``tuned``, beside it."""
    for bench in sorted(tuned.glob("*/bench.csv")):
        data = load_gpu(bench.parent)
        assert data, bench  # results() has refused it
        for picture in README_PICTURES:
            picture.png(data, bench.with_name(f"{picture.name}.png"))


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
        stale = [str(path.relative_to(ROOT)) for path in stale_pictures(ROOT / "tuned")]
        stale += ["README.md"] if new != old else []
        if stale:
            print(f"{', '.join(stale)}: older than the benches; run python tools/results_table.py", file=sys.stderr)
        return int(bool(stale))
    readme.write_text(new)
    draw(ROOT / "tuned")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
