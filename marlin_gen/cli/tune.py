"""``tune``: find, compile and time kernels for a model's layers; write the table; say what it gained."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from marlin_gen import env, whole_files, xz
from marlin_gen.cli import arguments, gpus, speedups, study
from marlin_gen.cli.console import note, out, print_json
from marlin_gen.cli.progress import tune_progress
from marlin_gen.dispatch import known_winners
from marlin_gen.formats import DEFAULT_DTYPE, DEFAULT_FORMAT
from marlin_gen.installed import find_tables
from marlin_gen.measurement import Measurer
from marlin_gen.record import lines_of_others, pack
from marlin_gen.replay import ReplayMeasurer, recording_name
from marlin_gen.search import SearchResult, TuneOptions, build_with_ninja
from marlin_gen.search import tune as search
from marlin_gen.table import DispatchTable
from marlin_gen.table_publish import publish
from marlin_gen.table_row import TableRow

GPU_TRIALS, REPLAY_TRIALS = 2000, 192  # a replay compiles for real, on machines that may have two cores
RECORD_HELP = "Put the trials beside the table, for replays. Those of other problems stay, if of the same versions."
TRIALS_HELP = f"Kernels to try per format; {GPU_TRIALS}, a replay {REPLAY_TRIALS}."


def tune(
    model: Annotated[str | None, typer.Option(help=arguments.MODEL_HELP)] = None,
    shapes: Annotated[str | None, typer.Option(help="n x k, as 4096x4096,6144x4096; besides --model's.")] = None,
    tp: Annotated[str, typer.Option(help="Tensor-parallel degrees of --model, as 1,2,4.")] = "1",
    tokens: Annotated[str, typer.Option(help="Values of m.")] = arguments.DEFAULT_TOKENS,
    formats: Annotated[str, typer.Option("--format", help=arguments.FORMAT_HELP)] = DEFAULT_FORMAT,
    dtypes: Annotated[str, typer.Option("--dtype", help=arguments.DTYPE_HELP)] = DEFAULT_DTYPE,
    device: Annotated[str, typer.Option(help="auto, cuda:0, or replay:h100 (no GPU needed).")] = "auto",
    trials: Annotated[int | None, typer.Option(help=TRIALS_HELP)] = None,
    budget: Annotated[str, typer.Option(help="Time for all formats, as 9m, 90s, 1h; defaults run anyway.")] = "9m",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the search.")] = 0,
    to: Annotated[Path | None, typer.Option("--out", help="Folder of tables to write to; default: the user's.")] = None,
    folder: Annotated[Path | None, typer.Option("--study", help="Where trials are kept; default: the user's.")] = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Go on with an earlier study of this work.")] = True,
    record: Annotated[bool, typer.Option("--record", help=RECORD_HELP)] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilers at once; default: the usable cores.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Search the fastest kernels for a model's layers and write a dispatch table."""
    work = arguments.work(model, shapes, tp, tokens, formats, dtypes)
    ends = time.monotonic() + arguments.seconds(budget)
    results: list[SearchResult] = []
    table: DispatchTable | None = None
    with gpus.measurer(device) as measurer:
        replay = isinstance(measurer, ReplayMeasurer)
        title = f"{measurer.gpu.name}{', replayed' if replay else ''}"
        note(f"{title}: {work}")
        versions = study.versions_of(measurer)
        target = (to := to or env.user_data_dir() / ("replayed" if replay else "tuned")) / measurer.gpu.slug
        arguments.check_writable(target, f"--out {to}")
        xz.module()  # by which a table's kernels are packed: now, not after the search
        recordings = {kind: target / recording_name(*kind) for kind in work.kinds if record}
        for kind, path in recordings.items():  # now, not after the search
            lines_of_others(path, versions, work.of(kind))
        for number, kind in enumerate(work.kinds):
            problems = study.recorded(work.of(kind), measurer) if tokens == arguments.DEFAULT_TOKENS else work.of(kind)
            options = TuneOptions(
                trials=trials if trials is not None else REPLAY_TRIALS if replay else GPU_TRIALS,
                # What an early end leaves over is shared by the kinds that are left.
                budget_s=max(ends - time.monotonic(), 1.0) / (len(work.kinds) - number), seed=seed,
            )  # fmt: skip
            if len(work.kinds) > 1:
                note(f"{kind} ({number + 1} of {len(work.kinds)})")
            at = folder / "-".join(kind) if folder and len(work.kinds) > 1 else folder
            kept = study.open_study(measurer, problems, seed, versions, at, fresh=not resume)
            with tune_progress() as on_progress:
                result = search(
                    problems, measurer, kept.log, study_path=kept.journal, options=options, versions=versions,
                    candidates=measurer.recording.configs(kind) if isinstance(measurer, ReplayMeasurer) else None,
                    winners_elsewhere=known_winners(measurer.gpu, find_tables(), problems, own=not replay),
                    build=build_with_ninja(jobs), on_progress=on_progress,
                )  # fmt: skip
            results.append(result)
            if result.interrupted:
                break
            try:
                if result.cells:  # at once, so that neither a later kind nor a closed pipe can lose it
                    table = _publish(result, measurer, target, kind)
                    note(f"table: {table.folder}")
                    if record:
                        with whole_files.locked(target):
                            pack(kept.log, recordings[kind], lines_of_others(recordings[kind], versions, problems))
            finally:
                if not json:
                    _print(result, f"{title}, {kind}" if len(work.kinds) > 1 else title)
    if json:
        _print_json(results, table)
    if results[-1].interrupted:
        done = f"the tables of {', '.join(map(str, work.kinds[: len(results) - 1]))} are written, " if table else ""
        note(f"interrupted; {done}the {results[-1].candidates} candidates measured are kept, the same command goes on"
             " from there")  # fmt: skip
        raise typer.Exit(130)
    if any(result.unsolved for result in results):
        raise typer.Exit(1)


def rows_of(result: SearchResult) -> list[TableRow]:
    """The table rows of a finished search."""
    return [TableRow.of(cell.winner, cell.default, cell.baseline) for cell in result.cells]


def _publish(result: SearchResult, measurer: Measurer, folder: Path, kind: arguments.Kind) -> DispatchTable:
    artifacts = list(result.artifacts.values())
    table = DispatchTable.build(result.gpu, rows_of(result), artifacts, study.provenance(measurer, kind))
    return publish(folder, table, artifacts)


def _print(result: SearchResult, title: str) -> None:
    rows = rows_of(result)
    if rows:
        out.print(speedups.speedup_table(rows, result.gpu, title))
        out.print(speedups.summary_table(rows, result.gpu))
    for problem in result.unsolved:
        out.print(f"[red]no working kernel was found for {problem.n}x{problem.k} m={problem.m}[/]")
    failed = ", ".join(f"{status} {count}" for status, count in sorted(result.failures.items()))
    note(
        f"{result.candidates} kernels tried, {result.pairs} timings{f', failed: {failed}' if failed else ''}"
        f"{', earlier sessions included' * result.resumed}; {result.seconds:.0f} s; the search ended: {result.stopped}"
    )


def _print_json(results: Sequence[SearchResult], table: DispatchTable | None) -> None:
    failures: Counter[str] = Counter()
    for result in results:
        failures.update(result.failures)
    print_json({
        "gpu": results[0].gpu.to_json(),
        "table": str(table.folder) if table else None,
        "rows": [speedups.as_json(row, result.gpu) for result in results for row in rows_of(result)],
        "unsolved": [vars(problem) for result in results for problem in result.unsolved],
        "candidates": sum(result.candidates for result in results),
        "timings": sum(result.pairs for result in results),
        "failures": dict(failures),
        "seconds": round(sum(result.seconds for result in results), 1),
        "stopped": ", ".join(dict.fromkeys(result.stopped for result in results)),
    })  # fmt: skip
