"""The inside of a model while it runs: activations by name, patches, steering, the lens, vectors and probes."""

from ..gguf.control import ControlVector as ControlVector
from .attribution import Attribution as Attribution
from .cache import Cache as Cache
from .grids import Grid as Grid
from .patches import Patch as Patch
from .points import Point as Point
from .probes import Probe as Probe
from .recording import Parted as Parted
from .recording import Recorded as Recorded
from .recording import Recording as Recording
from .recording import Replay as Replay
from .sae import SAE as SAE

__all__ = [
    "SAE",
    "Attribution",
    "Cache",
    "ControlVector",
    "Grid",
    "Parted",
    "Patch",
    "Point",
    "Probe",
    "Recorded",
    "Recording",
    "Replay",
]
