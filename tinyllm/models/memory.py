"""What fits into memory, and how a size is said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DeviceError
from ..kernels.backend import Backend, KVType, LayerCache

if TYPE_CHECKING:
    from .network import Network


def check_fits(be: Backend, need: int, what: str, advice: str) -> None:
    """Raise DeviceError, with sizes, where the device has less free than is needed."""
    free = be.memory()[0]
    if need > free:
        raise DeviceError(
            f"{be.name}: {what} need {readable(need)}; {readable(free)} are free. {advice}"
        )


@contextmanager
def allocating(what: str, advice: str) -> Iterator[None]:
    """Turn a MemoryError into a DeviceError: what fitted a moment ago may not fit now."""
    try:
        yield
    except MemoryError as e:
        raise DeviceError(f"the system gave no memory for {what}. {advice}") from e


def cache_bytes(layers: Sequence[LayerCache], n_ctx: int, kv_type: KVType) -> int:
    """Bytes that a cache holds when ``n_ctx`` positions have been read, about."""
    per_value = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}[kv_type]
    values = sum(c.n_head_kv * (c.head_dim + c.head_dim_v) * c.n_held(n_ctx) for c in layers)
    fixed = sum(4 * int(np.prod(shape)) for c in layers for _, shape in c.arrays)
    return int(values * per_value) + fixed


def default_n_ctx(net: Network) -> int:
    """The trained length, or less where a full cache would take more than half of the free memory."""
    fits = net.config.n_ctx_train
    for stage in net.stages:
        layers, room = stage.own(net.decoder.caches), stage.be.memory()[0] // 2
        layers += net.decoder.source_caches
        low, high = min(fits, 512), fits  # a context of ``low`` fits, or is the least that is given
        while low < high:
            middle = (low + high + 1) // 2
            if cache_bytes(layers, middle, net.kv_type) <= room:
                low = middle
            else:
                high = middle - 1
        fits = low
    return fits


def readable(n: float) -> str:
    """A number of bytes as people say it: "1.5 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
