"""``marlin-gen``: the list of commands, and what becomes of errors."""

from __future__ import annotations

import os
import warnings

import typer

from marlin_gen import env
from marlin_gen.cli import bench, convert, doctor, export, kernels, report, show, tables, tune, verify
from marlin_gen.cli.console import err
from marlin_gen.driver import LaunchError
from marlin_gen.toolchain import ToolchainError

COMMANDS = typer.Typer(
    name="marlin-gen",
    help="Tune, inspect and benchmark CUDA kernels for linear layers with 4- or 8-bit weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
COMMANDS.command()(tune.tune)
COMMANDS.command()(bench.bench)
COMMANDS.command()(show.show)
COMMANDS.command()(verify.verify)
COMMANDS.command()(export.export)
COMMANDS.command("import")(tables.import_)
COMMANDS.command()(tables.merge)
COMMANDS.command()(tables.diff)
COMMANDS.command()(report.report)
COMMANDS.command()(kernels.render)
COMMANDS.command("compile")(kernels.compile_)
COMMANDS.command()(convert.convert)
COMMANDS.command()(doctor.doctor)

# Their messages are written for users: the value, and the fix.
USER_ERRORS = (ValueError, OSError, ToolchainError, LaunchError)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. 0: done; 1: done, with failures that were listed; 2: not possible as asked; 130: interrupted."""
    warnings.showwarning = _warn
    try:
        COMMANDS(arguments)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BrokenPipeError:
        return 1
    except USER_ERRORS as error:
        if env.set_variables().get("MARLIN_GEN_LOG", "").lower() == "debug":  # log_level() refuses what is misspelt
            raise
        said = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename and error.strerror == os.strerror(error.errno or 0):
            said = f"{error.filename2 or error.filename} cannot be used ({error.strerror}); name another path"
        _say("bold red", "error", said)
        return 2
    return 0


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    _say("bold yellow", "warning", str(message))


def _say(style: str, kind: str, message: str) -> None:
    err.print(f"[{style}]{kind}:[/]", end=" ")
    err.print(message, markup=False, soft_wrap=True)
