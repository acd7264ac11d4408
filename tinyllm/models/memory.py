"""How to say a size, and whether something fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DeviceError
from ..kernels.backend import Backend


def check_fits(be: Backend, need: int, what: str, advice: str) -> None:
    """Raise DeviceError, with sizes, where the device has less free than is needed."""
    free = be.memory()[0]
    if need > free:
        raise DeviceError(
            f"{be.name}: {what} need {readable(need)}; {readable(free)} are free. {advice}"
        )


@contextmanager
def allocating(what: str, advice: str) -> Iterator[None]:
    """What fitted a moment ago may not fit now: that is a DeviceError too."""
    try:
        yield
    except MemoryError as e:
        raise DeviceError(f"the system gave no memory for {what}. {advice}") from e


def readable(n: float) -> str:
    """A number of bytes as people say it: "1.5 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
