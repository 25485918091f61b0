"""Whole checkpoints to the packed layout: ``marlin-gen convert``."""

from marlin_gen.convert.run import Report, convert

__all__ = ["Report", "convert"]
