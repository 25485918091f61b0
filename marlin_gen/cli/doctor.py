"""``doctor``: what was found on this machine, what is missing and how to get it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from marlin_gen.cli.console import out, print_json
from marlin_gen.doctor import PURPOSES, broken, examine

_PURPOSES = "; ".join(f"{name}: {what}" for name, what in PURPOSES.items())


def doctor(
    purpose: Annotated[
        str | None, typer.Option("--for", help=f"{_PURPOSES}. Default: tune with a GPU, replay without.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Say what was found: GPU, compilers, packages, tables. Exits with 1 if something essential is broken."""
    purpose, findings = examine(purpose)
    faults = broken(purpose, findings)
    if json:
        rows = [asdict(finding) for finding in findings]
        print_json({"purpose": purpose, "ok": not faults, "findings": rows})
        raise typer.Exit(1 if faults else 0)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[bold red]no[/]" if finding in faults else "[yellow]--[/]"
        out.print(f"{mark}  [bold]{finding.name:{width}}[/]", end="  ")
        out.print(finding.found, markup=False, soft_wrap=True)
        if not finding.ok and finding.fix:
            out.print(" " * (width + 6) + finding.fix, style="dim", markup=False, soft_wrap=True)
    out.print()
    if faults:
        out.print(f"[bold red]not ready[/] to {PURPOSES[purpose]}: {', '.join(f.name for f in faults)}")
        raise typer.Exit(1)
    out.print(f"[bold green]ready[/] to {PURPOSES[purpose]}")
