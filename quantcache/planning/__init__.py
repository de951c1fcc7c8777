"""What a cache takes before there is one: geometry of a model, bytes of its cache, and what fits on a GPU.

Nothing here loads torch, transformers or a weight.
"""

from quantcache.planning.fit import GIB, Fit, Plan, plan
from quantcache.planning.geometry import Geometry, GeometryError, LayerGeometry
from quantcache.planning.serving import Blocks, ServingFit, ServingPlan, plan_requests
from quantcache.planning.sources import PRESETS_SOURCE, find_geometry, is_preset, preset_names

__all__ = [
    "GIB",
    "PRESETS_SOURCE",
    "Blocks",
    "Fit",
    "Geometry",
    "GeometryError",
    "LayerGeometry",
    "Plan",
    "ServingFit",
    "ServingPlan",
    "find_geometry",
    "is_preset",
    "plan",
    "plan_requests",
    "preset_names",
]
