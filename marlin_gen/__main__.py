"""``python -m marlin_gen`` is ``marlin-gen``."""

from marlin_gen.cli import app

app()
