"""The command line, ``marlin-gen``. This file only finds out whether what it needs is installed."""

from __future__ import annotations

import sys

# Modules that the ``tune`` extra installs and serving does without.
_TUNE_EXTRA = {"jinja2", "ninja", "numpy", "optuna", "rich", "typer"}


def app() -> None:
    """The entry point of the ``marlin-gen`` script."""
    try:
        from marlin_gen.cli.root import main
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in _TUNE_EXTRA:
            raise
        sys.exit(f"marlin-gen needs {missing.name}, which is not installed: pip install 'marlin_gen[tune]'")
    sys.exit(main())
