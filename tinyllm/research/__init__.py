"""The inside of a model while it runs: activations by name, patches, steering, the lens, vectors and probes."""

from ..gguf.control import ControlVector as ControlVector
from .attribution import Attribution as Attribution
from .cache import Cache as Cache
from .grids import Grid as Grid
from .patches import Patch as Patch
from .points import Point as Point
from .probes import Probe as Probe
from .sae import SAE as SAE

__all__ = ["SAE", "Attribution", "Cache", "ControlVector", "Grid", "Patch", "Point", "Probe"]
