"""The kernel families by name. Adding one: a module here, a template beside, and a row."""

from marlin_gen.families.base import Registry
from marlin_gen.families.mma import MMA
from marlin_gen.families.wgmma import WGMMA

FAMILIES = Registry({"mma": MMA, "wgmma": WGMMA})
