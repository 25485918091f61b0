"""Which GPU the commands are about. Without one, None: what then is each command's own decision."""

from __future__ import annotations
