"""HTTP: the protocols of OpenAI, Anthropic and GPT4All's server, from one engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import create_app
    from .settings import Settings

__all__ = ["Settings", "create_app"]


def __getattr__(name: str) -> Any:
    """Import on use: the packages of the extra ``[server]`` may be missing."""
    if name == "Settings":
        from .settings import Settings

        return Settings
    if name == "create_app":
        from ..errors import ArgumentError

        try:
            from .app import create_app
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("tinyllm"):
                raise
            raise ArgumentError(
                f"the server needs {error.name}; in a checkout of tinyllm: pip install '.[server]'"
            ) from error
        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
