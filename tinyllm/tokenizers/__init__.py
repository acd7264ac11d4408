"""Text to ids and back, for every vocabulary that GGUF files carry.

>>> tokenizer = load(tinyllm.gguf.open(path).metadata)                         # doctest: +SKIP
>>> tokenizer.encode("Hello")                                                  # doctest: +SKIP
[1, 15043]

Ids are llama.cpp's, token for token, also where it simplifies the original tokenizer: in some
pre-tokenizers (see `pretokenizers`), and in WordPiece, which keeps of a Korean syllable the first consonant
only and drops spacing vowel signs along with accents. We differ on purpose in this:

=================================  ===============================  ====================================
what                               here                             llama.cpp
=================================  ===============================  ====================================
WordPiece, word of > 100 letters   the unknown token, as in the     matched by pieces
                                   original
decode                             the bytes the ids stand for,     with `clean_spaces`, spaces before
                                   always                           punctuation are removed
decode after a beginning token     the space that encode added is   it stays
                                   dropped
SPM, byte without a token          the unknown token                an exception
BPE, token outside the alphabet    decodes to its spelling          decodes to ``[UNK_BYTE_0x...]``
special id beyond the vocabulary   GGUFError                        a warning, and the default id
duplicate tokens                   GGUFError                        ends the process
text with a lone surrogate         ArgumentError                    U+FFFD for each byte
=================================  ===============================  ====================================
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ArgumentError, GGUFError, UnsupportedModel
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


def load(metadata: Mapping[str, Any], strict: bool = True) -> Tokenizer:
    """Build the tokenizer that a file's metadata describe.

    Parameters
    ----------
    metadata : Mapping
        `GGUFFile.metadata`, or any mapping with the same keys and plain lists.
    strict : bool
        Refuse an unknown pre-tokenizer; otherwise warn, and split as the default one does.

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
    if not isinstance(metadata, Mapping):
        raise ArgumentError(
            f"metadata is {type(metadata).__name__} {metadata!r:.40}; expected a mapping"
        )
    model = metadata.get("tokenizer.ggml.model")
    if not isinstance(model, str):
        found = "missing" if model is None else f"text is expected, not {type(model).__name__}"
        raise GGUFError(found, name="tokenizer.ggml.model")
    if model not in MODELS:
        raise UnsupportedModel(
            f"tokenizer.ggml.model: {model[:60]!r} is not a vocabulary we know; known are "
            f"{', '.join(MODELS)}"
        )
    try:
        return MODELS[model](metadata)
    except UnsupportedModel as error:
        if strict:
            raise
        warnings.warn(f"{error}. Splitting as 'default' does.", stacklevel=2)
        return MODELS[model]({**metadata, "tokenizer.ggml.pre": "default"})
