"""Typed reads of a file's ``<arch>.*`` keys, which remember what was read."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import GGUFError

# More than any model has, and little enough that no size overflows memory before it is checked.
LAYERS, WIDTH, CONTEXT = 512, 1 << 20, 1 << 31

# Keys that change no arithmetic of ours: what they say is also in the tensors, or is advice to others.
HARMLESS = {
    "tensor_data_layout",
    "expert_shared_count",  # the shared expert's width is its tensors'
    "expert_shared_feed_forward_length",
    "expert_feed_forward_length",  # the experts' width is their tensors'
    "expert_chunk_feed_forward_length",  # and so is the small ones'
    "classifier.output_labels",  # names of the scores; how many there are, the tensors say
    "interleave_moe_layer_step",
    "moe_every_n_layers",  # which layers have experts is seen from the tensors
    "time_mix_extra_dim",
    "time_decay_extra_dim",
    "token_shift_count",  # whether the feed-forward half shifts rows too, its tensors say
    *(f"attention.{of}_lora_rank" for of in ("decay", "iclr", "value_residual_mix", "gate")),
    "rescale_every_n_layers",  # a guard against float16 overflow; our activations are float32
    "full_attention_interval",  # which layers are recurrent is seen from the tensors
    "attention.recurrent_layers",
    "rope.dimension_sections",  # axes of a picture; of text all have the same position
    *(f"dense_{i}_feat_{side}" for i in (2, 3) for side in ("in", "out")),
    "embedding_length_out",
    "attention.indexer.head_count",  # what the index is made of; see ``n_ctx_most``
    "attention.indexer.key_length",
    "attention.indexer.types",
    "router_logit_softcapping",  # no implementation of Grok caps them
    "n_deepstack_layers",  # a picture's activations are added after these layers
    "moe_latent_size",  # the width inside is the experts' tensors'
    "hrm.prefix_lm",  # a prompt is read causally where nobody says how far its prefix goes
}


class Keys:
    """Typed reads of ``<arch>.*`` keys that remember what was read."""

    def __init__(self, metadata: Mapping[str, Any], arch: str) -> None:
        self.metadata, self.arch, self.prefix = metadata, arch, arch + "."
        self.read: set[str] = set()
        self.n_skipped = 0  # layers at the end of the file that are not read

    def has(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; a missing key without default is an error."""
        self.read.add(key)
        value = self.metadata.get(self.prefix + key, default)
        if value is None:
            raise GGUFError("required key is missing", name=self.prefix + key)
        return value

    def whole(self, key: str, default: int | None = None, low: int = 0, high: int = WIDTH) -> int:
        """A key that is an integer in [low, high]."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise GGUFError(
                f"is {value!r:.60}; expected a whole number in [{low}, {high}]",
                name=self.prefix + key,
            )
        return value

    def number(
        self,
        key: str,
        default: float | None = None,
        positive: bool = False,
        low: float = -math.inf,
    ) -> float:
        """A finite number of at least ``low``; greater than 0 if ``positive``."""
        value = self.get(key, default)
        fine = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not fine or not math.isfinite(value) or (positive and value <= 0) or value < low:
            kind = "positive" if positive else "finite"
            least = f" of at least {low:g}" if low > -math.inf else ""
            raise GGUFError(
                f"is {value!r:.60}; expected a {kind} number{least}", name=self.prefix + key
            )
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise GGUFError(f"is {value!r:.60}; expected true or false", name=self.prefix + key)
        return value

    def text(self, key: str, default: str) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise GGUFError(f"is {value!r:.60}; expected a string", name=self.prefix + key)
        return value

    def per_layer(
        self, key: str, n_layer: int, default: Any, low: int, high: int = WIDTH
    ) -> tuple[int, ...]:
        """One integer for all layers, or an array with one for each."""
        value = self.get(key, default)
        if isinstance(value, (np.ndarray, list, tuple)):
            values = [v.item() if isinstance(v, np.generic) else v for v in value]
            values = values[: n_layer if len(values) == n_layer + self.n_skipped else None]
        else:
            values = [value] * n_layer
        good = all(isinstance(v, int) and low <= v <= high for v in values)
        if len(values) != n_layer or not good:
            raise GGUFError(
                f"is {value!r:.60}; expected {n_layer} whole numbers in [{low}, {high}], or one",
                name=self.prefix + key,
            )
        return tuple(int(v) for v in values)

    def unknown(self) -> list[str]:
        """Keys of this architecture that nobody read and that may change the mathematics."""
        ours = (k[len(self.prefix) :] for k in self.metadata if k.startswith(self.prefix))
        return sorted(self.prefix + k for k in ours if k not in self.read and k not in HARMLESS)


def numbers(
    metadata: Mapping[str, Any],
    key: str,
    n: int,
    more: int = 0,
    lowest: float = -sys.float_info.max,
) -> tuple[float, ...]:
    """The first n of an array of n or n + ``more`` numbers of at least ``lowest``, or one for all."""
    value = metadata.get(key)
    try:
        values = np.atleast_1d(np.asarray(value))
    except ValueError:  # lists of several lengths
        values = np.empty(0)
    if values.shape == (n + more,):
        values = values[:n]
    fine = values.dtype.kind in "fiu" and values.shape in ((n,), (1,))
    if not fine or not all(lowest <= v < math.inf for v in values.tolist()):
        of = " of at least 0" if lowest == 0 else ""
        raise GGUFError(f"is {value!r:.60}; expected {n} numbers{of}", name=key)
    return tuple(np.broadcast_to(values, n).astype(float).tolist())
