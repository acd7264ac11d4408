"""Run language models from GGUF files in pure Python, fast."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors, gguf, research, tokenizers
    from .engine.completion import Completion
    from .engine.scheduler import Engine
    from .gguf.convert.folder import convert
    from .gguf.merge import merge
    from .gguf.quantize import quantize
    from .kernels.devices import list_devices
    from .kernels.outside import kernel
    from .loading import load
    from .measuring import imatrix
    from .model import Model
    from .research.compare import compare
    from .research.recording import record, replay

__version__ = "0.1.0"
__all__ = [
    "Completion",
    "Engine",
    "Model",
    "__version__",
    "compare",
    "convert",
    "errors",
    "gguf",
    "imatrix",
    "kernel",
    "list_devices",
    "load",
    "merge",
    "quantize",
    "record",
    "replay",
    "research",
    "tokenizers",
]
_MODULES = {"errors", "gguf", "research", "sdk", "tokenizers"}
_HOMES = {
    "Completion": "engine.completion",
    "Engine": "engine.scheduler",
    "Model": "model",
    "compare": "research.compare",
    "convert": "gguf.convert.folder",
    "imatrix": "measuring",
    "kernel": "kernels.outside",
    "list_devices": "kernels.devices",
    "load": "loading",
    "merge": "gguf.merge",
    "quantize": "gguf.quantize",
    "record": "research.recording",
    "replay": "research.recording",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import tinyllm`` stays light."""
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
