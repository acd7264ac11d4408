"""A model's work on a table: each row's text in, each row's result out, resumed after any kill."""

from __future__ import annotations

from .tasks import Decide, Embed, Generate, Score, Task

__all__ = ["Decide", "Embed", "Generate", "Score", "Task"]
