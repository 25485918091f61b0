"""``render`` and ``compile``: one kernel's source, and what the compiler makes of kernels."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.syntax import Syntax

from marlin_gen.arch import ARCHS
from marlin_gen.cli import arguments
from marlin_gen.cli.console import note, out, print_json
from marlin_gen.families import FAMILIES
from marlin_gen.measurement import Artifact

Arch = Annotated[str, typer.Option(help=f"Target of a key that names none: {', '.join(ARCHS)}.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

KEY_HELP = "A spec, plan or config key, as tables and `show` print them."


def render(key: Annotated[str, typer.Argument(help=KEY_HELP)], arch: Arch = "sm_90a") -> None:
    """Print the CUDA source of one kernel."""
    from marlin_gen.render import render as render_spec

    text = render_spec(arguments.spec(key, arch)).text
    if out.is_terminal:
        out.print(Syntax(text, "cuda", background_color="default"))
    else:
        print(text, end="")


def compile_(
    keys: Annotated[list[str], typer.Argument(help=KEY_HELP)],
    arch: Arch = "sm_90a",
    compiler: Annotated[str | None, typer.Option(help="nvcc, nvrtc or auto; default: MARLIN_GEN_COMPILER.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilers at once; default: the usable cores.")] = None,
    json: AsJson = False,
) -> None:
    """Compile kernels into the cache; report registers, spills and shared memory."""
    from marlin_gen.compile import CompileFailure, compile_all
    from marlin_gen.render import render as render_spec
    from marlin_gen.toolchain import find_toolchain

    specs = list(dict.fromkeys(arguments.spec(key, arch) for key in keys))
    toolchain = find_toolchain(compiler)
    started = time.monotonic()
    results = compile_all([render_spec(spec) for spec in specs], toolchain, jobs)
    elapsed = time.monotonic() - started

    reports = [_report(results[spec]) for spec in specs]
    if json:
        compiled_by = f"{toolchain.name} {toolchain.version}"
        print_json({"compiler": compiled_by, "seconds": round(elapsed, 2), "kernels": reports})
    else:
        note(f"{toolchain.name} {toolchain.version} ({toolchain.origin}), {elapsed:.1f} s")
        for report in reports:
            _print(report)
    if any(isinstance(result, CompileFailure) for result in results.values()):
        raise typer.Exit(1)


def _report(result: Any) -> dict[str, Any]:
    if not isinstance(result, Artifact):
        return {"spec": result.spec.key, "error": result.reason}
    from marlin_gen.compile import reject_artifact

    config = result.spec.config
    return {
        "spec": result.spec.key,
        "registers": result.registers,
        "spill_bytes": result.spill_bytes,
        "smem_bytes": FAMILIES.of(config).smem_bytes(config, result.spec.format_row) + result.static_smem_bytes,
        "threads": FAMILIES.of(config).threads(config),
        "cubin_bytes": result.cubin.stat().st_size,
        "directory": str(result.directory),
        "rejected": reject_artifact(result),
    }


def _print(report: dict[str, Any]) -> None:
    out.print(f"[bold]{report['spec']}[/]", soft_wrap=True)
    if "error" in report:
        out.print("  [red]does not compile:[/]", end=" ")
        out.print(report["error"], markup=False, soft_wrap=True)
        return
    out.print(
        f"  {report['registers']} registers x {report['threads']} threads, {report['spill_bytes']} bytes spilled,"
        f" {report['smem_bytes'] / 1024:.1f} KiB shared memory, {report['cubin_bytes'] / 1024:.1f} KiB cubin"
    )
    if report["rejected"]:
        out.print(f"  [yellow]not used: {report['rejected']}[/]")
    out.print(f"  {report['directory']}", style="dim", markup=False, soft_wrap=True)
