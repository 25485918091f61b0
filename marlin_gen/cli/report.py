"""``report``: the committed measurements as one HTML page, and as PNGs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from marlin_gen import env, whole_files
from marlin_gen.cli.console import note


def report(
    tuned: Annotated[Path | None, typer.Option(help="Folder of <gpu>/table.json; default: the shipped one.")] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Also write <gpu>/<picture>.png into this folder.")] = None,
) -> None:
    """Write the committed measurements as one self-contained HTML page."""
    from marlin_gen.report import data

    gpus = data.load(tuned or env.tuned_dir())
    try:
        from marlin_gen.report import page, pictures
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "matplotlib":
            raise
        fix = "pip install 'marlin_gen[report]'"
        raise ValueError(f"report draws with matplotlib, which is not installed: {fix}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    whole_files.write(out, page.render(gpus).encode())
    note(f"{', '.join(found.table.gpu.slug for found in gpus)}: written to {out}")
    if png:
        for found in gpus:
            at = png / found.table.gpu.slug
            drawn = [p.name for p in pictures.PICTURES if p.png(found, at / f"{p.name}.png")]
            note(f"{', '.join(drawn)}: written to {at}" if drawn else f"{at.name}: nothing to draw")
