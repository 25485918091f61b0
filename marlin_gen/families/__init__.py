"""The kernel families by name. Adding one: a module here, a template beside, and a row."""

from __future__ import annotations

from marlin_gen.families.base import Registry
from marlin_gen.families.mma import MMA

FAMILIES = Registry({"mma": MMA})
