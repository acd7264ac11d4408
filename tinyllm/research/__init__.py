"""The inside of a model while it runs: activations by name, patches, steering, the lens."""

from .attribution import Attribution as Attribution
from .cache import Cache as Cache
from .grids import Grid as Grid
from .patches import Patch as Patch
from .points import Point as Point

__all__ = ["Attribution", "Cache", "Grid", "Patch", "Point"]
