"""Sparse autoencoders with ready weights: rows of activations as few features of many, and back.

The folders are SAELens': ``cfg.json`` and ``sae_weights.safetensors``. The kinds: "standard" (ReLU),
arXiv:2309.08600; "gated", arXiv:2404.16014; "topk", arXiv:2406.04093; "jumprelu", arXiv:2407.14435.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, GGUFError, UnsupportedModel
from ..gguf.convert.safetensors import read_header

Floats = npt.NDArray[np.float32]
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# what each kind has beside the matrices and the decoder's bias
TENSORS = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
KNOWN = {"W_enc", "W_dec", "b_dec"}.union(*TENSORS.values())
NORMALISED = ("none", "layer_norm", "constant_norm_rescale")
LN_EPS = 1e-5


class SAE:
    """A sparse autoencoder of a point's rows [.., n_in] with ``n_features`` features.

    ``kind`` is "standard", "topk", "jumprelu" or "gated"; ``point`` the name of the activation that it is for,
    as its configuration has it (TransformerLens' names are understood wherever a name is), or "".

    Examples
    --------
    >>> import numpy as np
    >>> from tinyllm.research import SAE
    >>> eye = np.eye(4, dtype=np.float32)
    >>> zero = np.zeros(4, np.float32)
    >>> sae = SAE({"W_enc": eye, "W_dec": eye, "b_enc": zero, "b_dec": zero})
    >>> sae.decode(sae.encode([1.0, -2.0, 0.0, 3.0])).tolist()
    [1.0, 0.0, 0.0, 3.0]
    """

    def __init__(
        self, weights: Mapping[str, npt.ArrayLike], config: Mapping[str, Any] | None = None
    ) -> None:
        config = config or {}
        self.kind = str(config.get("architecture", "standard"))
        self.normalised = str(config.get("normalize_activations") or "none")
        if self.kind not in TENSORS:
            raise UnsupportedModel(
                f"architecture {self.kind!r:.40}; we read {', '.join(sorted(TENSORS))}"
            )
        if self.normalised not in NORMALISED:
            raise UnsupportedModel(
                f"normalize_activations {self.normalised!r:.40}; we read {', '.join(NORMALISED)}; have SAELens "
                "fold it into the weights first"
            )
        act = config.get("activation_fn", config.get("activation_fn_str", "relu"))
        if self.kind != "topk" and act not in ("relu", None):
            raise UnsupportedModel(f"activation_fn {act!r:.40}; we read relu")
        self._w = {n: np.asarray(x, np.float32) for n, x in weights.items()}
        need = {"W_enc", "W_dec", "b_dec", *TENSORS[self.kind]}
        if need - set(self._w):
            raise ArgumentError(
                f"a {self.kind} autoencoder needs {', '.join(sorted(need))}; found {', '.join(sorted(self._w))}"
            )
        for name in sorted(set(self._w) - KNOWN):
            if name != "scaling_factor" or (self._w[name] != 1).any():
                raise UnsupportedModel(f"{name:.40}: weights that we do not compute with")
        self._check_shapes()
        metadata = config.get("metadata") or {}
        self.point = str(metadata.get("hook_name") or config.get("hook_name") or "")
        k = config.get("k") or 0
        if self.kind == "topk" and not (type(k) is int and 0 < k <= self.n_features):
            raise ArgumentError(f"k={k!r:.40}; expected 1 to {self.n_features} for topk")
        self.k = k if type(k) is int else 0
        self._centred = bool(config.get("apply_b_dec_to_input", True))
        self._by_norm = bool(config.get("rescale_acts_by_decoder_norm", False))

    def _check_shapes(self) -> None:
        """Raise ArgumentError unless the weights fit each other and are finite."""
        w = self._w
        if w["W_enc"].ndim != 2 or w["W_dec"].shape != w["W_enc"].shape[::-1]:
            raise ArgumentError(
                f"W_enc {w['W_enc'].shape} and W_dec {w['W_dec'].shape}; expected [n_in, n] and [n, n_in]"
            )
        for name in ("b_dec", *TENSORS[self.kind]):
            n = self.n_in if name == "b_dec" else self.n_features
            if w[name].shape != (n,):
                raise ArgumentError(f"{name} has shape {w[name].shape}; expected ({n},)")
        for name, x in w.items():
            if not np.isfinite(x).all():
                raise ArgumentError(f"{name} has a NaN or an infinity")

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> SAE:
        """Read a folder that SAELens has saved.

        Raises
        ------
        ArgumentError
            The folder has no autoencoder, or one whose parts do not fit.
        UnsupportedModel
            It is of a kind that we do not compute.
        GGUFError
            A file is damaged.
        """
        place = Path(folder)
        if not (place / CONFIG).is_file() or not (place / WEIGHTS).is_file():
            raise ArgumentError(f"{place}: expected {CONFIG} and {WEIGHTS}, as SAELens writes them")
        try:
            config = json.loads((place / CONFIG).read_text("utf-8"))
        except (ValueError, RecursionError) as e:
            raise GGUFError(f"is no JSON: {e}", path=str(place / CONFIG)) from None
        if not isinstance(config, dict) or not isinstance(config.get("metadata", {}), dict | None):
            raise GGUFError("is no configuration", path=str(place / CONFIG))
        return cls({n: t.read() for n, t in read_header(place / WEIGHTS).items()}, config)

    @property
    def n_in(self) -> int:
        """Values of a row."""
        return int(self._w["W_enc"].shape[0])

    @property
    def n_features(self) -> int:
        """How many features there are."""
        return int(self._w["W_enc"].shape[1])

    def direction(self, feature: int) -> Floats:
        """What one feature adds to a row [n_in], such as for ``Model.steered``.

        Raises ArgumentError if there is no such feature.
        """
        whole = isinstance(feature, Integral) and not isinstance(feature, bool)
        if not whole or not 0 <= feature < self.n_features:
            raise ArgumentError(f"feature {feature!r:.40}; expected 0 to {self.n_features - 1}")
        return np.asarray(self._w["W_dec"][feature])

    @property
    def _norms(self) -> Floats:
        """The lengths of the decoder's rows [n_features]; 1 for a feature that adds nothing."""
        found = np.linalg.norm(self._w["W_dec"], axis=1)
        return np.asarray(np.where(found == 0, np.float32(1), found))

    def encode(self, x: npt.ArrayLike) -> Floats:
        """Features [.., n_features] of rows x [.., n_in]."""
        w, (rows, _, _) = self._w, self._normal(x)
        rows = rows - w["b_dec"] if self._centred else rows
        inner = rows @ w["W_enc"]
        if self.kind == "gated":
            size = inner * np.exp(w["r_mag"]) + w["b_mag"]
            gated: np.ndarray = np.where(
                inner + w["b_gate"] > 0, np.maximum(size, 0), np.float32(0)
            )
            return gated
        inner = inner + w["b_enc"]
        if self.kind == "topk":
            inner = inner * self._norms if self._by_norm else inner
            kept = np.argpartition(-inner, self.k - 1, axis=-1)[..., : self.k]
            found = np.zeros_like(inner)
            best = np.maximum(np.take_along_axis(inner, kept, -1), 0)
            np.put_along_axis(found, kept, best, -1)
            return found
        found = np.maximum(inner, 0)
        return np.where(inner > w["threshold"], found, 0) if self.kind == "jumprelu" else found

    def decode(self, features: npt.ArrayLike, like: npt.ArrayLike | None = None) -> Floats:
        """Rows [.., n_in] of features [.., n_features].

        ``like``, the rows that were encoded, is needed by autoencoders that bring rows to one size first
        (``normalize_activations``): it says back to which.
        """
        w, found = self._w, np.asarray(features, np.float32)
        if found.ndim == 0 or found.shape[-1] != self.n_features:
            raise ArgumentError(
                f"features of shape {found.shape}; expected rows of {self.n_features}"
            )
        if self._by_norm and self.kind == "topk":
            found = found / self._norms
        rows = found @ w["W_dec"] + w["b_dec"]
        if self.normalised == "none":
            return np.asarray(rows)
        if like is None:
            raise ArgumentError(
                f"normalize_activations is {self.normalised!r}; give the rows that were encoded as like="
            )
        _, scale, centre = self._normal(like)
        return np.asarray(rows * scale + centre)

    def _normal(self, x: npt.ArrayLike) -> tuple[Floats, Any, Any]:
        """Rows as the encoder reads them, with the scale and the centre that lead back."""
        rows = np.asarray(x, np.float32)
        if rows.ndim == 0 or rows.shape[-1] != self.n_in:
            raise ArgumentError(f"x has shape {rows.shape}; expected rows of {self.n_in} values")
        if self.normalised == "layer_norm":
            centre = rows.mean(-1, keepdims=True)
            scale = (rows - centre).std(-1, ddof=1, keepdims=True)
            return (rows - centre) / (scale + np.float32(LN_EPS)), scale, centre
        if self.normalised == "constant_norm_rescale":
            scale = np.linalg.norm(rows, axis=-1, keepdims=True) / np.float32(self.n_in**0.5)
            return rows / scale, scale, 0
        return rows, 1, 0

    def __repr__(self) -> str:
        return f"<tinyllm.research.SAE {self.kind} of {self.n_features} features at {self.point!r}>"
