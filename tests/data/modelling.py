"""Models that transformers does not have, as their publishers' code defines them, for make_rows.py."""

from __future__ import annotations
