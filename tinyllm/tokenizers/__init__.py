"""Text to ids and back, for every vocabulary that GGUF files carry.

>>> tokenizer = load(tinyllm.gguf.open(path).metadata)                         # doctest: +SKIP
>>> tokenizer.encode("Hello")                                                  # doctest: +SKIP
[1, 15043]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import GGUFError, UnsupportedModel
from .base import Tokenizer
from .bpe import BPE
from .rwkv import RWKV
from .spm import SPM
from .unigram import Unigram
from .wpm import WPM

__all__ = ["MODELS", "Tokenizer", "load"]

# tokenizer.ggml.model -> what reads it
MODELS: dict[str, Callable[[Mapping[str, Any]], Tokenizer]] = {
    "llama": SPM,
    "gpt2": BPE,
    "gemma4": BPE,
    "whitespace": BPE,
    "bert": WPM,
    "t5": Unigram,
    "rwkv": RWKV,
}


def load(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a file's metadata describe.

    Parameters
    ----------
    metadata : Mapping
        `GGUFFile.metadata`, or any mapping with the same keys and plain lists.

    Returns
    -------
    Tokenizer

    Raises
    ------
    UnsupportedModel
        If the kind of vocabulary or its pre-tokenizer is not known.
    GGUFError
        If a key is missing, has the wrong type or length, or contradicts another; it names the key.
    """
    model = metadata.get("tokenizer.ggml.model")
    if not isinstance(model, str):
        found = "missing" if model is None else f"text is expected, not {type(model).__name__}"
        raise GGUFError(found, name="tokenizer.ggml.model")
    if model not in MODELS:
        raise UnsupportedModel(
            f"tokenizer.ggml.model: {model[:60]!r} is not a vocabulary we know; known are "
            f"{', '.join(MODELS)}"
        )
    return MODELS[model](metadata)
