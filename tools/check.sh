#!/usr/bin/env bash
# What a change must pass before it is committed: lint, types, line budgets, tests without a GPU.
# Tools are taken from the active environment, else from .venv (the README's test command makes it).
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${VIRTUAL_ENV:-}" ] || PATH="$PWD/.venv/bin:$PATH"
ruff check .
mypy
python tools/size.py
pytest -q -n auto --dist loadfile "${@:-tests}"
