"""How to say a size, and whether something fits."""

from __future__ import annotations

from ..errors import DeviceError
from ..kernels.backend import Backend


def check_fits(be: Backend, need: int, what: str, advice: str) -> None:
    """Raise DeviceError, with sizes, where the device has less free than is needed."""
    free = be.memory()[0]
    if need > free:
        raise DeviceError(
            f"{be.name}: {what} need {readable(need)}; {readable(free)} are free. {advice}"
        )


def readable(n: float) -> str:
    """A number of bytes as people say it: "1.5 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
