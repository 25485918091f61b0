"""The pictures, drawn by matplotlib: one drawing each for the page (SVG) and for the README (PNG).

Equal data and versions give equal bytes: no dates, no random ids.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from marlin_gen.report.data import GpuData
from marlin_gen.report.series import BLOCK_TOKENS, ideal_speedup, search_progress, sustained_runs, transformer_blocks
from marlin_gen.sustained import CUBLAS as CUBLAS_RUN

# Okabe and Ito's colours, told apart by colour-blind readers too.
OURS, DEFAULT, CUBLAS = "#0072b2", "#e69f00", "#8c8c8c"
LAYER_COLOURS = {"qkv_proj": "#56b4e9", "o_proj": DEFAULT, "gate_up_proj": OURS, "down_proj": "#009e73"}
INK, FAINT = "#1f2328", "#d8dee4"  # text and grid; the page's style sheet takes them over in its SVGs
LOWEST, HIGHEST = 0.4, 1.0  # roofline fractions at the ends of the colour scale

STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": 11, "font.family": "DejaVu Sans",
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK,
    "grid.color": FAINT, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "lines.linewidth": 2.0, "figure.dpi": 100,
    "svg.fonttype": "none", "svg.hashsalt": "marlin_gen",  # letters stay text; ids depend on content only
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """``draw`` makes the figure, or returns None where the GPU lacks the data."""

    name: str  # file name without its ending
    alt: str  # what it shows, for those who do not see it
    draw: Callable[[GpuData], Figure | None]

    def svg(self, data: GpuData) -> str | None:
        """An ``<svg>`` element to stand in a page: ids prefixed, ink and grid in the page's colours."""
        with rc_context(STYLE):
            figure = self.draw(data)
            if figure is None:
                return None
            text = io.StringIO()
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = text.getvalue()[text.getvalue().index("<svg") :]
        prefix = f"{self.name}-{data.table.gpu.slug}-"
        svg = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{prefix}", svg)
        svg = svg.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--grid)")
        return svg.replace("<svg ", f'<svg role="img" aria-label="{self.alt}" ', 1)

    def png(self, data: GpuData, path: Path) -> bool:
        """Write a PNG that names the files it shows, with their hashes. False: nothing to draw."""
        with rc_context(STYLE):
            figure = self.draw(data)
            if figure is None:
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"Software": None, "Source": data.sources, "Description": self.alt}
            figure.savefig(path, dpi=150, facecolor="white", metadata=metadata, pil_kwargs={"compress_level": 9})
        return True


def shown(path: Path) -> str:
    """The files and hashes that a PNG was drawn from; empty where it does not say."""
    from PIL import Image  # matplotlib needs it too

    with Image.open(path) as image:
        return str(image.info.get("Source", ""))


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _token_axis(axes: Axes, tokens: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(m) for m in tokens], rotation=0 if len(tokens) <= 9 else 45)
    axes.minorticks_off()
    axes.set_xlabel("m, tokens of a batch")


def speedup(data: GpuData) -> Figure | None:
    """Times cuBLAS fp16 by m, on the largest matrix."""
    if not data.cells:
        return None
    n, k = data.shapes[-1]
    cells = data.of_shape(n, k)
    tokens = [cell.bench.m for cell in cells]
    figure, axes = _axes(6.4, 4.0)
    between = sorted({round(2 ** (i / 8)) for i in range(8 * tokens[-1].bit_length())} | set(tokens))
    between = [m for m in between if tokens[0] <= m <= tokens[-1]]  # the ideal turns between measured points
    ideal = [ideal_speedup(replace(cells[0].bench.problem, m=m), data.table.gpu, data.tflops) for m in between]
    axes.plot(between, ideal, "--", color=CUBLAS, label="ideal, by arithmetic")
    ours = [cell.bench.speedup for cell in cells]
    axes.plot(tokens, ours, "o-", color=OURS, markersize=5, label="marlin_gen, tuned", zorder=4)
    default = [(c.bench.m, c.default_speedup) for c in cells if c.default_speedup is not None]
    if default:
        x, y = zip(*default, strict=True)
        axes.plot(x, y, "s-", color=DEFAULT, markersize=3.5, linewidth=1.4, label="marlin_gen, untuned default")
    axes.axhline(1.0, color=INK, linewidth=1.0)
    axes.annotate("cuBLAS fp16", (tokens[0], 1.0), xytext=(0, 4), textcoords="offset points")
    axes.set(title=f"n x k = {n} x {k}, {data.table.gpu.name}", ylabel="times as fast as cuBLAS fp16")
    axes.set_ylim(0, 1.12 * max(*ideal, *ours))
    _token_axis(axes, tokens)
    axes.grid(axis="y")
    axes.legend(loc="upper right")
    return figure


def block(data: GpuData) -> Figure | None:
    """Stacked times of a transformer block's linear layers, fp16 beside ours."""
    blocks = transformer_blocks(data.benched)
    if not blocks:
        return None
    figure, axes = _axes(6.4, 1.3 + 0.95 * len(blocks))
    longest = max(b.cublas_us for b in blocks)
    labels: list[tuple[float, str]] = []
    for position, b in enumerate(blocks):
        for y, whose, times, gain in (
            (position - 0.2, "cuBLAS fp16", [layer.cublas_us for layer in b.layers], ""),
            (position + 0.2, "marlin_gen", [layer.us for layer in b.layers], f", {b.cublas_us / b.us:.2f}x"),
        ):
            for i, layer in enumerate(b.layers):
                colour = LAYER_COLOURS[layer.name]
                axes.barh(y, times[i], 0.36, left=sum(times[:i]), color=colour, edgecolor=colour, linewidth=0.3)
            axes.text(sum(times) + 0.01 * longest, y, f"{sum(times):.0f} us{gain}", va="center")
            labels.append((y, whose))
        axes.text(0.005 * longest, position - 0.42, ", ".join(b.models), va="bottom", weight="bold")
    axes.set_yticks(*zip(*labels, strict=True))
    axes.set_ylim(len(blocks) - 0.45, -0.75)
    axes.set_xlim(0, 1.22 * longest)
    axes.set_xlabel(f"microseconds of one block's linear layers, m = {BLOCK_TOKENS}")
    axes.tick_params(axis="y", length=0)
    keys = [Patch(color=colour, label=name) for name, colour in LAYER_COLOURS.items()]
    figure.legend(handles=keys, loc="outside upper center", ncols=4, columnspacing=1.2, handlelength=1.2)
    return figure


def roofline(data: GpuData) -> Figure | None:
    """Fractions of the roofline, shape x m, numbers in the cells."""
    if not data.cells:
        return None
    shapes = data.shapes
    tokens = sorted({cell.bench.m for cell in data.cells})
    figure, axes = _axes(1.9 + 0.46 * len(tokens), 1.35 + 0.36 * len(shapes))
    norm, colours = Normalize(LOWEST, HIGHEST), colormaps["viridis"]
    for cell in data.cells:
        row = cell.bench
        fraction = row.roofline_fraction(data.tflops)
        x, y = tokens.index(row.m), shapes.index((row.n, row.k))
        axes.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=colours(norm(fraction)), linewidth=0.5)  # no seams
        ink = "black" if norm(fraction) > 0.6 else "white"
        axes.text(x + 0.5, y + 0.5, f"{fraction:.2f}", ha="center", va="center", size=9, color=ink)
    axes.set_xticks([i + 0.5 for i in range(len(tokens))], [str(m) for m in tokens])
    axes.set_yticks([i + 0.5 for i in range(len(shapes))], [f"{n} x {k}" for n, k in shapes])
    axes.set(xlim=(0, len(tokens)), ylim=(len(shapes), 0), xlabel="m, tokens of a batch", ylabel="n x k")
    axes.set_title(f"Fraction of the roofline, {data.table.gpu.name}")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    scale = ScalarMappable(norm, colours)
    figure.colorbar(scale, ax=axes, pad=0.01, aspect=3 * len(shapes), ticks=[LOWEST, 0.6, 0.8, HIGHEST], extend="both")
    return figure


def search(data: GpuData) -> Figure | None:
    """Best so far against candidates tried."""
    if data.recording is None or not (progress := search_progress(data.recording, data.tflops)).fractions:
        return None
    figure, axes = _axes(6.4, 3.4)
    tried = range(1, len(progress.fractions) + 1)
    axes.step(tried, progress.fractions, where="post", color=OURS)
    end = (tried[-1], progress.fractions[-1])
    axes.annotate(f"{end[1]:.3f} after {end[0]}", end, xytext=(0, 7), textcoords="offset points", ha="right")
    axes.set(xlabel="candidates tried", xscale="log", xlim=(1, None))
    axes.set(ylabel="mean fraction of the roofline", ylim=(0, 1.1))
    ticks = [t for t in (1, 3, 10, 30, 100, 300, 1000, 3000) if t <= len(tried)]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_title(f"Best so far, mean of {progress.problems} problems")
    axes.grid()
    return figure


def sustained(data: GpuData) -> Figure | None:
    """Throughput over time, and what the GPU did meanwhile, for each kernel's run."""
    if not data.sustained:
        return None
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True, height_ratios=[2.2, 1, 1, 1])
    for kernel, rows in sustained_runs(data.sustained).items():
        label, colour = ("cuBLAS fp16", CUBLAS) if kernel == CUBLAS_RUN else ("marlin_gen", OURS)
        for axes, name in zip(panels, ("tflops", "sm_clock_mhz", "power_w", "temperature_c"), strict=True):
            points = [(row.seconds, value) for row in rows if (value := getattr(row, name)) is not None]
            axes.plot(*zip(*points, strict=True) if points else ((), ()), color=colour, label=label)
    for axes, title in zip(panels, ("TFLOP/s", "SM MHz", "watts", "°C"), strict=True):
        axes.set_ylabel(title)
        axes.margins(y=0.25)
        axes.grid(axis="y")
    cell = data.sustained[0]
    panels[0].set_title(f"n x k = {cell.n} x {cell.k}, m = {cell.m}, {data.table.gpu.name}")
    panels[0].set_ylim(0, 1.25 * max(row.tflops for row in data.sustained))
    panels[0].legend(loc="upper right", ncols=2)
    panels[3].set_xlabel("seconds without a pause")
    figure.align_ylabels(panels)
    return figure


SPEEDUP = Picture("speedup", "Line chart: speedup over cuBLAS fp16 by batch size, tuned, untuned and ideal", speedup)
BLOCK = Picture("block", "Bar chart: time of a transformer block's linear layers, cuBLAS fp16 and marlin_gen", block)
ROOFLINE = Picture("roofline", "Heat map: fraction of the roofline by matrix and batch size", roofline)
SEARCH = Picture("search", "Line chart: best mean fraction of the roofline against candidates tried", search)
SUSTAINED = Picture("sustained", "Line charts over time: throughput, SM clock, power and temperature", sustained)
PICTURES = (SPEEDUP, BLOCK, ROOFLINE, SEARCH, SUSTAINED)
README_PICTURES = (SPEEDUP, ROOFLINE)
