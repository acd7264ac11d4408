"""Measuring a model on text: what its products read, for quantisers (``tinyllm imatrix``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from . import gguf
from .engine.progress import loading
from .errors import ArgumentError, GGUFError
from .files import check_apart
from .gguf.imatrix import Importance, write_imatrix
from .kernels.backend import Array, Backend
from .loading import locate, placing, vocabulary
from .model import Model
from .models.adapters import Adapters, Beside
from .models.build import build

Progress = Callable[[Iterable[int], int], Iterable[int]]


class Watching(Adapters):
    """Stands where adapters stand, beside each product of a layer, and changes nothing: it adds up squares."""

    def __init__(self, found: Importance) -> None:
        super().__init__()
        self.found = found
        self._seen: set[str] = set()

    def beside(
        self, be: Backend, name: str, rows: slice | np.ndarray | None = None
    ) -> Beside | None:
        if (
            not name.startswith(("blk.", "enc.blk.")) or name in self._seen
        ):  # other rows read what the first do
            return None
        self._seen.add(name)
        return Watch(be, name, self.found)


class Watch:
    """Adds up the squares of what one matrix reads."""

    idle = False

    def __init__(self, be: Backend, name: str, found: Importance) -> None:
        self.be, self.name, self.found = be, name, found

    def added(self, y: Array, x: Array, each: int = 1) -> Array:
        """y [T, n_out] as it is; x [T, n_in] is counted."""
        rows = np.asarray(self.be.numpy(x), np.float64)
        sums = np.einsum("ti,ti->i", rows, rows)[None]
        self.found.add(self.name, sums, np.array([float(len(rows))]))
        return y

    def added_to_embedding(self, y: Array, ids: Array, scale: float) -> Array:
        """y as it is: an embedding reads numbers of rows only."""
        return y

    def added_to_experts(self, y: Array, x: Array, experts: Array, n: int) -> Array:
        """y [T, k, n_out] as it is; x [T, n_in] or [T, k, n_in] is counted for the experts chosen."""
        rows, chosen = np.array(self.be.numpy(x), np.float64), np.array(self.be.numpy(experts))
        t, k = chosen.shape
        squares = np.square(
            np.broadcast_to(rows[:, None] if rows.ndim == 2 else rows, (t, k, rows.shape[-1]))
        )
        sums, counts = np.zeros((n, rows.shape[-1])), np.zeros(n)
        np.add.at(sums, chosen.reshape(-1), squares.reshape(t * k, -1))
        np.add.at(counts, chosen.reshape(-1), 1)
        self.found.add(self.name, sums, counts)
        return y


def imatrix(
    model: str | os.PathLike[str] | None,
    text: str,
    out: str | os.PathLike[str] | None = None,
    *,
    window: int = 512,
    n_windows: int | None = None,
    device: str | None = None,
    n_threads: int | None = None,
    dataset: str = "text",
    progress: Progress = lambda windows, n: windows,
) -> Importance:
    """Measure how large the inputs of a model's products are on a text, for ``quantize(imatrix=...)``.

    Parameters
    ----------
    model : path-like or None
        As ``load`` takes it.
    text : str
        Some hundred kilobytes of what the model will be used for.
    out : path-like, optional
        The file to write: GGUF, or llama.cpp's older format if it ends in ``.dat``.
    window : int
        Tokens of a piece; each begins anew. A shorter text is one piece.
    n_windows : int, optional
        At most so many pieces.
    device, n_threads
        As ``load`` has them.
    dataset : str
        What the file calls the text.
    progress : callable
        Wraps the iteration over pieces.

    Raises
    ------
    ArgumentError
        There is no text, `out` is the model's file, or the model has no layers whose products read anything.
    GGUFError, UnsupportedModel, DeviceError
        As ``load``.

    Examples
    --------
    >>> import tinyllm
    >>> found = tinyllm.imatrix(None, "Once upon a time there was a cat.")
    >>> found.means("blk.0.ffn_down.weight").shape
    (1, 768)
    """
    found = Importance(datasets=[dataset], chunk_size=window)
    if window < 2 or (n_windows is not None and n_windows < 1):
        raise ArgumentError(f"window={window}, n_windows={n_windows}; expected at least 2 and 1")
    with watched(model, found, device, n_threads) as watching:
        if out is not None:
            check_apart(out, watching._file.paths)
        pieces = windows(watching, text, min(window, watching.config.n_ctx_train))[:n_windows]
        for i in progress(range(len(pieces)), len(pieces)):
            read(watching, pieces[i])
            found.chunks += 1
    if not found.sums:
        raise ArgumentError("no product of this model reads anything that could be measured")
    if out is not None:
        write_imatrix(out, found)
    return found


def watched(
    model: str | os.PathLike[str] | None,
    found: Importance,
    device: str | None,
    n_threads: int | None,
) -> Model:
    """A model whose products are watched."""
    file = gguf.open(
        locate(None if model is None else Path(model) if not isinstance(model, str) else model)
    )
    try:
        tokenizer = vocabulary(file)
        place = placing(device, n_threads, None)
        network = build(
            file.metadata, file.tensors, place, progress=loading, adapters=Watching(found)
        )
    except GGUFError as e:
        file.close()
        raise file.located(e) from e
    except BaseException:
        file.close()
        raise
    return Model(file, network, network.config.n_ctx_train, tokenizer)


def windows(model: Model, text: str, window: int) -> list[list[int]]:
    """The text's ids in whole pieces, each with a beginning-of-text token where the model has one."""
    tokenizer = model.tokenizer
    ids = tokenizer.encode(text, parse_special=False)
    n = max(len(ids) // window, 1)
    pieces = [list(ids[i * window : (i + 1) * window]) for i in range(n)]
    if len(pieces[0]) < 2:
        raise ArgumentError(f"the text has {len(ids)} tokens; expected some thousands")
    for piece in pieces:
        if tokenizer.add_bos and tokenizer.bos is not None:
            piece[0] = tokenizer.bos
    return pieces


def read(model: Model, ids: Sequence[int]) -> None:
    """Have the model read ids from an empty state."""
    if not model.config.causal:
        model.network.hidden([ids])
        return
    state = model.new_state(len(ids))
    state.append(ids)
    while left := len(ids) - state.n_past:
        model.network.forward([(state, min(left, model.network.n_batch), "none")])
