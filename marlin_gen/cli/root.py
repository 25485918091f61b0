"""``marlin-gen``: the list of commands, and what becomes of errors."""

from __future__ import annotations

import warnings

import click
import typer

from marlin_gen import env
from marlin_gen.cli import bench, doctor, kernels, show, tune
from marlin_gen.cli.console import err
from marlin_gen.toolchain import ToolchainError

COMMANDS = typer.Typer(
    name="marlin-gen",
    help="Tune, inspect and benchmark CUDA kernels for linear layers with 4-bit weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
COMMANDS.command()(tune.tune)
COMMANDS.command()(bench.bench)
COMMANDS.command()(show.show)
COMMANDS.command()(kernels.render)
COMMANDS.command("compile")(kernels.compile_)
COMMANDS.command()(doctor.doctor)

# Their messages are written for users: the value, and the fix.
USER_ERRORS = (ValueError, OSError, ToolchainError)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. 0: done; 1: done, with failures that were listed; 2: not possible as asked; 130: interrupted."""
    warnings.showwarning = _warn
    try:
        return COMMANDS(arguments, standalone_mode=False) or 0
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.exceptions.Abort:
        return 130
    except click.ClickException as error:
        _say("error", error.format_message())
        return 2
    except KeyboardInterrupt:
        _say("interrupted", "nothing measured is lost; the same command goes on where this one stopped")
        return 130
    except USER_ERRORS as error:
        if env.log_level() == "debug":
            raise
        _say("error", str(error) or type(error).__name__)
        return 2


def _say(kind: str, message: str) -> None:
    err.print(f"[bold red]{kind}:[/]", end=" ")
    err.print(message, markup=False, soft_wrap=True)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    err.print("[bold yellow]warning:[/]", end=" ")
    err.print(str(message), markup=False, soft_wrap=True)
