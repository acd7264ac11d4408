"""The inside of a model while it runs: activations by name, patches, steering, the lens."""

from .cache import Cache as Cache
from .patches import Patch as Patch
from .points import Point as Point

__all__ = ["Cache", "Patch", "Point"]
