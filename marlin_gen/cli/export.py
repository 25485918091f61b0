"""``export``: the fewest kernels that serve a table within a stated regret, as a folder or an archive."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from marlin_gen import kernel_pack, subset
from marlin_gen.cli import arguments, study
from marlin_gen.cli.arguments import Kind
from marlin_gen.cli.console import note, out, print_json, table
from marlin_gen.cli.show import choose_table
from marlin_gen.config import KernelSpec
from marlin_gen.installed import find_tables
from marlin_gen.measurement import Artifact
from marlin_gen.record import Recording, load_recording
from marlin_gen.subset import Selection
from marlin_gen.table import FILE_NAME, DispatchTable
from marlin_gen.table_archive import SUFFIX, write_archive
from marlin_gen.table_row import KernelEntry, defaults_beside

COMPILE_HELP = "Choose from recorded kernels that the table lacks too; compile them. Only of today's templates."


@dataclass(frozen=True)
class Point:
    """One point of the curve of size against regret."""

    regret: float  # allowed
    kernels: int
    least: int  # no set of fewer kernels has that regret
    bytes: int  # of the cubins, as the driver takes them; those that are not compiled yet count as much as the mean
    worst_regret: float
    mean_regret: float


def export(
    to: Annotated[Path, typer.Option("--out", help=f"An archive (*{SUFFIX}) to write, or a folder of tables.")],
    gpu: Annotated[str | None, typer.Option(help="The start of a table's name, as h100; default: this GPU's.")] = None,
    formats: Annotated[str | None, typer.Option("--format", help=arguments.ONLY_FORMATS_HELP)] = None,
    dtypes: Annotated[str | None, typer.Option("--dtype", help=arguments.ONLY_DTYPES_HELP)] = None,
    regret: Annotated[str, typer.Option(help="How much slower than tuned a row may become.")] = "3%",
    defaults: Annotated[
        bool, typer.Option("--defaults/--no-defaults", help="Keep the default kernels, for shapes far from every row.")
    ] = True,
    recording: Annotated[
        list[Path] | None, typer.Option(help="Recorded trials, or a study's log; default: those beside the table.")
    ] = None,
    build: Annotated[
        bool, typer.Option("--compile", help=COMPILE_HELP)
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Write the smallest set of kernels that serves a table, or what it has for some formats, within a regret."""
    limit = arguments.percent("--regret", regret)
    found = choose_table(gpu, find_tables())
    target = to if to.suffix == SUFFIX else to / found.gpu.slug
    if to.suffix != SUFFIX and (target / FILE_NAME).exists():
        raise ValueError(f"{target} holds a table already; name another --out, or remove it")
    whole = found.intact()
    if lost := len(found.rows) - len(whole.rows):
        note(f"{lost} of {len(found.rows)} rows are left out: their kernels are missing or damaged")
    whole = _only(whole, formats, dtypes)
    recordings = [load_recording(path) for path in recording or _beside(found)]
    if not recordings:
        note("there are no recorded trials beside the table: each row has only its own kernel and its default")
    usable = whole.kernels.keys() | (_recorded(recordings, whole) if build else set())
    keep = _default_kernels(whole) if defaults else set()
    options = subset.options_of(whole, recordings, usable)
    chosen = subset.select(options, limit, keep)
    artifacts = _compiled([key for key in chosen.kernels if key not in whole.kernels])
    made = _table(whole, chosen, artifacts)
    with tempfile.TemporaryDirectory(prefix="marlin_gen-export-") as scratch:
        place = Path(scratch) / found.gpu.slug if to.suffix == SUFFIX else target
        written = made.write(place, artifacts, [whole.folder] if whole.folder else [])
        sizes = {**_sizes(whole), **_sizes(written)}
        packed = sum(path.stat().st_size for path in kernel_pack.files(place))
        if to.suffix == SUFFIX:
            write_archive(to, [written])
    curve = [_point(subset.select(options, at, keep), sizes) for at in sorted({*subset.CURVE, limit})]
    point = _point(chosen, sizes)
    if json:
        print_json({
            "gpu": found.gpu.to_json(), "out": str(target), "rows": len(chosen.rows), "defaults_kept": len(keep),
            **asdict(point), "packed_bytes": packed, "curve": [asdict(at) for at in curve],
        })  # fmt: skip
        return
    columns = ("allowed regret", ">kernels", ">at least", ">KB", ">worst row", ">mean")
    out.print(table(f"{found.gpu.name}, {len(chosen.rows)} rows", columns, (_line(at, limit) for at in curve)))
    kept = f", {len(keep)} of them kept as defaults" if keep else ""
    before = f"{len(whole.kernels)}, {sum(_sizes(whole).values()) / 1e3:.0f} KB"
    note(f"{point.kernels} kernels{kept}, {point.bytes / 1e3:.0f} KB, instead of {before}; written to {target}, packed"
         f" to {packed / 1e3:.0f} KB")  # fmt: skip


def _only(whole: DispatchTable, formats: str | None, dtypes: str | None) -> DispatchTable:
    """The rows and kernels of these formats; a ValueError when there is no such row."""
    is_wanted = arguments.only_kinds(formats, dtypes)
    rows = tuple(row for row in whole.rows if is_wanted(Kind.of(row.problem)))
    if whole.rows and not rows:
        there = ", ".join(sorted({str(Kind.of(row.problem)) for row in whole.rows}))
        asked = " ".join(word for word in (formats, dtypes) if word)
        raise ValueError(f"the table of {whole.gpu.slug} has no row for {asked}; it has {there}")
    kernels = {key: kernel for key, kernel in whole.kernels.items() if is_wanted(Kind.of(KernelSpec.from_key(key)))}
    return replace(whole, rows=rows, kernels=kernels)


def _beside(found: DispatchTable) -> list[Path]:
    return sorted(found.folder.glob("recording*.jsonl.gz")) if found.folder else []


def _default_kernels(whole: DispatchTable) -> set[str]:
    """What an untuned shape may be served with, as far as the table has it."""
    return {spec.key for spec in defaults_beside(whole.gpu, whole.rows)} & whole.kernels.keys()


def _recorded(recordings: Sequence[Recording], whole: DispatchTable) -> set[str]:
    """What was recorded of the table's formats; a ValueError unless compiling gives the kernels that were timed."""
    from marlin_gen.toolchain import find_toolchain

    compiler = find_toolchain()
    ours = {"templates": study.templates_digest(), "compiler": f"{compiler.name} {compiler.version}"}
    keys: set[str] = set()
    kinds = {Kind.of(row.problem) for row in whole.rows}
    for recording in recordings:
        if kinds.isdisjoint(map(Kind.of, recording.problems())):
            continue
        for name, value in ours.items():
            if (theirs := recording.versions.get(name)) != value:
                raise ValueError(
                    f"the trials were recorded with {name} {theirs}, here is {value}: kernels compiled now would not be"
                    " those that were timed. Leave --compile out, or tune again with --record"
                )
        keys |= {
            KernelSpec(m.plan.config, m.problem.weight_format, m.problem.act_dtype, whole.gpu.arch.name).key
            for m in recording.measurements
        }
    return keys


def _compiled(keys: Sequence[str]) -> list[Artifact]:
    if not keys:
        return []
    from marlin_gen.compile import CompileFailure, compile_all
    from marlin_gen.render import render

    note(f"compiling {len(keys)} kernels")
    made: list[Artifact] = []
    for spec, result in compile_all([render(KernelSpec.from_key(key)) for key in keys]).items():
        if isinstance(result, CompileFailure):
            raise ValueError(f"{spec.key} does not compile: {result.reason}")
        made.append(result)
    return made


def _table(whole: DispatchTable, chosen: Selection, artifacts: Sequence[Artifact]) -> DispatchTable:
    """The exported table; its last run says what was allowed."""
    fresh = {artifact.spec.key: KernelEntry.of(artifact) for artifact in artifacts}
    kernels = {key: fresh.get(key) or whole.kernels[key] for key in chosen.kernels}
    date = datetime.now(timezone.utc).date().isoformat()
    run = {"date": date, "export": {"regret": chosen.limit, "worst_regret": round(chosen.worst, 4)}}
    return replace(whole, rows=chosen.rows, kernels=kernels, runs=(*whole.runs, run), folder=None)


def _sizes(found: DispatchTable) -> dict[str, int]:
    """Bytes of each cubin."""
    return {key: len(found.cubin(key) or b"") for key in found.kernels}


def _point(chosen: Selection, sizes: Mapping[str, int]) -> Point:
    mean = sum(sizes.values()) // max(len(sizes), 1)
    total = sum(sizes.get(key, mean) for key in chosen.kernels)
    worst, average = round(chosen.worst, 4), round(chosen.mean, 4)
    return Point(chosen.limit, len(chosen.kernels), chosen.least, total, worst, average)


def _line(at: Point, limit: float) -> tuple[str, ...]:
    mark = "*" if at.regret == limit else ""
    shares = (f"{value:.1%}" for value in (at.worst_regret, at.mean_regret))
    return (f"{at.regret:.1%}{mark}", str(at.kernels), str(at.least), f"{at.bytes / 1e3:.0f}", *shares)
