"""Many machines, by Ray: classes for ``Dataset.map_batches``, and an application for Ray Serve.

Needs the extra ``[ray]``; importing this package does not import Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import Decide, Embed, Generate, Score, per_node
    from .serve import application

__all__ = ["Decide", "Embed", "Generate", "Score", "application", "per_node"]


def __getattr__(name: str) -> Any:
    """Import on use, so that what needs Ray is told apart from what does not."""
    if name == "application":
        from .data import ray

        ray()  # else a package of the server's would be missed first
        from .serve import application

        return application
    if name in __all__:
        from . import data

        return getattr(data, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
