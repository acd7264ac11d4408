"""From a folder of safetensors, as Hugging Face's libraries write it, to a GGUF file: no torch is needed."""

from __future__ import annotations

from .folder import convert

__all__ = ["convert"]
