"""``bench``: time what the tables choose, beside cuBLAS and the read floor, into a CSV."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from marlin_gen import bench as benching
from marlin_gen.bench import BenchRow
from marlin_gen.cli import arguments, gpus, sustained
from marlin_gen.cli.arguments import Kind
from marlin_gen.cli.console import err, note, out, print_json, table, times, us
from marlin_gen.cli.progress import cells_progress
from marlin_gen.config import KernelSpec
from marlin_gen.cost_model import attainable_tflops
from marlin_gen.dispatch import Choice, Dispatcher, forced_plan
from marlin_gen.formats import DEFAULT_DTYPE, DEFAULT_FORMAT
from marlin_gen.installed import find_tables
from marlin_gen.measurement import Artifact, Measurement
from marlin_gen.sustained import FILE_NAME


def bench(
    model: Annotated[str | None, typer.Option(help=arguments.MODEL_HELP)] = None,
    shapes: Annotated[str | None, typer.Option(help="n x k, as 4096x4096,6144x4096.")] = None,
    tp: Annotated[str, typer.Option(help="Tensor-parallel degrees of --model.")] = "1",
    tokens: Annotated[str, typer.Option(help="Values of m.")] = arguments.DEFAULT_TOKENS,
    formats: Annotated[str, typer.Option("--format", help=arguments.FORMAT_HELP)] = DEFAULT_FORMAT,
    dtypes: Annotated[str, typer.Option("--dtype", help=arguments.DTYPE_HELP)] = DEFAULT_DTYPE,
    device: Annotated[str, typer.Option(help="auto, which is cuda:0, or cuda:1, ...")] = "cuda:0",
    csv: Annotated[
        Path | None, typer.Option(help="Where to write; default: bench[-<format>-<dtype>].csv by its table, else here.")
    ] = None,
    seconds: Annotated[float | None, typer.Option("--sustained", min=1, help="Run one cell so many seconds.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Time the table's choices beside cuBLAS and the read floor, and write a CSV."""
    work = arguments.work(model, shapes, tp, tokens, formats, dtypes)
    if seconds is not None:
        sustained.check_one(work.problems)
    gpu = gpus.require_gpu(device, "bench times kernels")
    dispatcher = Dispatcher(gpu, find_tables(), forced_plan())
    choices = {problem: next(dispatcher.choose(problem)) for problem in work.problems}
    folder = own_folder(dispatcher)
    paths = {kind: csv or folder / benching.file_name(*kind) for kind in work.kinds}
    path = next(iter(paths.values()))
    if path.is_dir():
        raise ValueError(f"--csv {path} is a folder; name a file in it")
    arguments.check_writable(path.parent, f"--csv {path}")

    rows: list[BenchRow] = []
    failures = 0
    with tempfile.TemporaryDirectory(prefix="marlin_gen-bench-") as scratch, gpus.measurer(device) as measurer:
        artifacts = artifacts_of(list(choices.values()), dispatcher, Path(scratch))
        entries = [(problem, artifacts[choice.spec], choice.plan) for problem, choice in choices.items()]
        if seconds is not None:
            return sustained.run(measurer, *entries[0], seconds, csv or folder / FILE_NAME, json)
        try:
            with cells_progress(len(entries), "bench") as advance:
                for found in benching.measure(measurer, entries):
                    if isinstance(found, BenchRow):
                        rows.append(found)
                        advance(f"{found.n}x{found.k} m={found.m}: {us(found.us)} us, {times(found.speedup)} cuBLAS")
                    else:
                        failures += 1
                        err.print(f"[red]failed:[/] {escape(_sentence(found))}", soft_wrap=True)
                        advance("")
        except BaseException:
            if rows:  # a whole earlier bench is not overwritten by a part of this one
                partial = path.with_suffix(".partial.csv")
                benching.write_csv(partial, rows)
                note(f"stopped; the {len(rows)} of {len(entries)} cells measured are in {partial}")
            raise
    if not rows:
        raise ValueError(f"none of the {failures} cells could be measured; marlin-gen doctor says what is wrong")
    written: dict[Path, list[BenchRow]] = {}
    for row in rows:
        written.setdefault(paths[_kind(row)], []).append(row)
    for to, of_path in written.items():
        benching.write_csv(to, of_path)
    names = ", ".join(map(str, written))
    if json:
        print_json({"csv": names, "failures": failures, "rows": [vars(row) for row in rows]})
    else:
        _print(rows, attainable_tflops(gpu), gpu.name)
        note(f"written to {names}")
    if failures:
        raise typer.Exit(1)


def _sentence(failed: Measurement) -> str:
    p = failed.problem
    return f"{p.n}x{p.k} m={p.m} {failed.plan.key}: {failed.status} {failed.detail}".rstrip()


def own_folder(dispatcher: Dispatcher) -> Path:
    """That of the first table of this GPU, never of one that only lends it kernels; without one the current folder."""
    own = (table.folder for table in dispatcher.tables if dispatcher.gpu.same_class(table.gpu))
    return next((folder for folder in own if folder), Path())


def artifacts_of(choices: Sequence[Choice], dispatcher: Dispatcher, scratch: Path) -> dict[KernelSpec, Artifact]:
    """The kernel of each choice: the one a table ships, so that what is timed is what is served; else compiled now."""
    from marlin_gen.compile import CompileFailure, compile_all
    from marlin_gen.render import render

    found: dict[KernelSpec, Artifact] = {}
    missing: list[KernelSpec] = []
    for choice in choices:
        if choice.kernel is None:
            missing.append(choice.spec)
        elif choice.spec not in found:
            shipped = (table.find(choice.spec.key) for table in dispatcher.tables)
            kernel, cubin = next(pair for pair in shipped if pair)  # as ``locate`` found it
            found[choice.spec] = kernel.artifact(choice.spec, cubin, scratch)
    for spec, result in compile_all([render(spec) for spec in missing]).items() if missing else ():
        if isinstance(result, CompileFailure):
            raise ValueError(f"{spec.key} does not compile: {result.reason}")
        found[spec] = result
    return found


def _print(rows: Sequence[BenchRow], tflops: float, name: str) -> None:
    kinds = {kind: [r for r in rows if _kind(r) == kind] for kind in dict.fromkeys(map(_kind, rows))}
    for kind, of_kind in kinds.items():
        _print_kind(of_kind, tflops, f"{name}, {kind}" if len(kinds) > 1 else name)


def _kind(row: BenchRow) -> Kind:
    return Kind.of(row.problem)


def _print_kind(rows: Sequence[BenchRow], tflops: float, title: str) -> None:
    columns = ("n x k", ">m", ">us", ">95 %", ">chained", ">cuBLAS", ">floor", ">ratio", ">roofline", ">error")
    out.print(table(title, columns, (
        (
            f"{r.n}x{r.k}", str(r.m), us(r.us), f"{us(r.us_low)}-{us(r.us_high)}", us(r.chained_us), us(r.cublas_us),
            us(r.read_floor_us), times(r.speedup), f"{r.roofline_fraction(tflops):.2f}", f"{r.relative_error:.1e}",
        )
        for r in rows
    )))  # fmt: skip
    for s in benching.summarise(rows, tflops):
        worst = f"worst {times(s.worst_speedup)}"
        parts = f"roofline {s.roofline:.2f}, chained {s.chained:.2f}"
        out.print(f"{s.regime:24} {times(s.speedup)} cuBLAS ({worst}), {parts}")
