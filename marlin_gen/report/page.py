"""The page: one HTML file that asks the network for nothing. Its frame and style are page.html."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from marlin_gen.bench import summarise
from marlin_gen.report import pictures
from marlin_gen.report.data import Cell, GpuData, provenance
from marlin_gen.report.pictures import Picture
from marlin_gen.report.series import BLOCK_TOKENS, search_progress, sustained_runs
from marlin_gen.sustained import CUBLAS, kept_share

BENCH_COMMAND = "marlin-gen bench --model llama-3.1-8b"
TUNE_COMMAND = "marlin-gen tune --model llama-3.1-8b --out tuned --record"
SUSTAINED_COMMAND = "marlin-gen bench --sustained 60 --shapes 28672x4096 --tokens 4096"

CELL_COLUMNS = (
    "m", "us", "spread", "default us", "cuBLAS us", "floor us", "x cuBLAS", "roofline", "error",
    "family", "tile", "k a stage", "warps", "stages", "blocks an SM", "cluster", "partition", "dequant",
    "raster",
)  # fmt: skip


def render(gpus: Sequence[GpuData]) -> str:
    """The whole page; equal data gives equal text."""
    links = " · ".join(f'<a href="#{data.table.gpu.slug}">{escape(data.table.gpu.name)}</a>' for data in gpus)
    head = f"<p>{links}</p>\n" if len(gpus) > 1 else ""
    frame = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return Template(frame).substitute(body=head + "\n".join(_gpu(data) for data in gpus))


def _gpu(data: GpuData) -> str:
    """All sections of one GPU."""
    gpu = data.table.gpu
    facts = f"{gpu.num_sms} SMs, {gpu.bandwidth_gbs} GB/s in theory, {data.tflops:.0f} TFLOP/s in the roofline"
    parts = [
        f'<h2 id="{gpu.slug}">{escape(gpu.name)}</h2>',
        f'<p class="soft">{facts}. Tuned {escape(provenance(data.table))}.</p>',
        _summary(data),
        _picture(data, pictures.SPEEDUP, "Speedup over cuBLAS fp16 by batch size", _speedup_caption(), BENCH_COMMAND),
        _picture(data, pictures.BLOCK, f"A transformer block at m = {BLOCK_TOKENS}", _block_caption(), BENCH_COMMAND),
        _picture(data, pictures.ROOFLINE, "How near the machine's limit", _roofline_caption(), BENCH_COMMAND),
        _cells(data),
        _picture(data, pictures.SEARCH, "What the search tried", _search_caption(data), TUNE_COMMAND),
        _picture(data, pictures.SUSTAINED, "Sustained throughput", _sustained_caption(data), SUSTAINED_COMMAND),
    ]
    return "\n".join(part for part in parts if part)


def _picture(data: GpuData, picture: Picture, title: str, caption: str, command: str) -> str:
    """A heading with its picture and caption; without data, the command that makes it."""
    svg = picture.svg(data)
    if svg is None:
        what = "No measurement of this is committed"
        return f"<h3>{title}</h3>\n<p>{what} for this GPU; <code>{command}</code> makes it.</p>"
    return f'<h3>{title}</h3>\n<figure><div class="wide">{svg}</div><figcaption>{caption}</figcaption></figure>'


def _speedup_caption() -> str:
    return (
        "The largest matrix of the bench. The ideal is the ratio of two lower bounds, fp16 over 4 bits: the bytes at"
        " the theoretical bandwidth, or the multiplications where they take longer; it falls to 1 where both are bound"
        " by multiplications. Points above it are sizes at which cuBLAS misses its own bound. The default is what runs"
        " without tuning: its time relative to the tuned kernel's is the tune's, where both were timed in turns."
    )


def _block_caption() -> str:
    return (
        f"Sums of the times of the four linear layers of one decoder layer on one GPU at m = {BLOCK_TOKENS}, each as"
        " benched by itself; attention and everything between is left out. Models whose layers have the same sizes"
        " share a pair of bars; those with a layer that neither bench.csv nor models.csv has are not shown. What only"
        " the latter has was not tuned: it runs on what the look-up gives."
    )


def _roofline_caption() -> str:
    return (
        "Roofline over measured time, for each matrix and batch size. The colour scale is perceptually uniform and ends"
        f" at {pictures.LOWEST} and {pictures.HIGHEST}. The attainable rate is a reference, what cuBLAS about reaches"
        " on a card that rests between replays: values a little above 1 exceed it."
    )


def _search_caption(data: GpuData) -> str:
    if data.recording is None:
        return ""
    progress = search_progress(data.recording, data.tflops)
    failed = [f"{count} {status}" for status, count in progress.outcomes if status != "ok"]
    works = dict(progress.outcomes).get("ok", 0)
    return (
        f"The recorded tune, in the order in which candidates were tried: {works} ran and were right"
        f"{', not usable: ' + ', '.join(failed) if failed else ''}. The height is the mean over all problems of the"
        " roofline over the best time so far, as first timed; a problem that has no time yet counts as 0."
    )


def _sustained_caption(data: GpuData) -> str:
    kept = [
        f"{'cuBLAS fp16' if kernel == CUBLAS else 'marlin_gen'} {kept_share(rows):.1%}"
        for kernel, rows in sustained_runs(data.sustained).items()
    ]
    return (
        "One cell without a pause, then cuBLAS fp16 as long, after a rest that lets the card cool down; clock, power"
        f" and temperature as NVML reports them. The last second's throughput over the first one's: {', '.join(kept)}."
    )


def _summary(data: GpuData) -> str:
    rows = [cell.bench for cell in data.cells]
    if not rows:
        return ""
    columns = ("regime", "cells", "x cuBLAS fp16", "worst", "roofline", "worst")
    lines = (
        (s.regime, str(s.cells), *(f"{v:.2f}" for v in (s.speedup, s.worst_speedup, s.roofline, s.worst_roofline)))
        for s in summarise(rows, data.tflops)
    )
    return _table(columns, lines, "words") + '\n<p class="soft">Means are geometric.</p>'


def _cells(data: GpuData) -> str:
    """Every cell with its kernel, a fold for each matrix."""
    title = "<h3>The best kernel of every cell</h3>"
    if not data.cells:
        return f"{title}\n<p>No bench is committed for this GPU; <code>{BENCH_COMMAND}</code> makes one.</p>"
    folds = []
    for n, k in data.shapes:
        table = _table(CELL_COLUMNS, (_cell(cell, data.tflops) for cell in data.of_shape(n, k)))
        folds.append(f"<details><summary>n x k = {n} x {k}</summary>\n{table}\n</details>")
    legend = (
        "Spread: the width of the median's 95 % interval. Error: relative, Frobenius, against an fp32"
        " product of the same quantised weight. Floor: a plain read of the packed weight. Tile:"
        " tokens x features of a block; warps: side by side along the features x splitting k; stages: of the ring, or"
        " of a ring of weights + one of activations."
    )
    return "\n".join([title, *folds, f'<p class="soft">{legend}</p>'])


def _cell(cell: Cell, tflops: float) -> tuple[str, ...]:
    """The texts of CELL_COLUMNS."""
    row, plan = cell.bench, cell.plan
    c = plan.config
    return (
        str(row.m), _us(row.us), f"{(row.us_high - row.us_low) / row.us:.1%}", _us(cell.default_us), _us(row.cublas_us),
        _us(row.read_floor_us), f"{row.speedup:.2f}", f"{row.roofline_fraction(tflops):.2f}",
        f"{row.relative_error:.1e}", c.family, f"{c.block_m} x {c.block_n}", str(c.block_k),
        f"{c.warps_n} x {c.warps_k}", f"{c.num_stages} + {c.a_stages}" if c.a_stages else str(c.num_stages),
        str(c.blocks_per_sm), str(c.cluster_size), c.partition, c.dequant, str(plan.raster),
    )  # fmt: skip


def _us(value: float | None) -> str:
    """Four significant digits at most, or a dash."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _table(columns: Iterable[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    style = f' class="{kind}"' if kind else ""
    return f'<div class="wide"><table{style}><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
