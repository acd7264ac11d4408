"""What the fuzzer feeds: for each target its inputs and the function that must survive their mutants."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gguf.malformed import VALID
from tinyllm import gguf


@dataclass(frozen=True)
class Target:
    """Inputs that work, and a function that takes a mutant of one."""

    name: str
    inputs: list[bytes]
    feed: Callable[[bytes], Any]


def scratch_file() -> Path:
    """A file in memory if the machine has such a place; removed with the process's folder."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    SCRATCH.append(tempfile.TemporaryDirectory(prefix="tinyllm-fuzz-", dir=folder))
    return Path(SCRATCH[-1].name) / "mutant.gguf"


SCRATCH: list[tempfile.TemporaryDirectory[str]] = []


def reader() -> Target:
    """Open, read everything; what is accepted must be written back as it was."""
    path = scratch_file()

    def feed(raw: bytes) -> None:
        path.write_bytes(raw)
        with gguf.open(path) as file:
            for tensor in file.tensors.values():
                tensor.raw.sum()
            for value in file.metadata.values():
                if isinstance(value, gguf.StringArray):
                    value.tolist()
            if not any(map(has_empty_list, file.metadata.values())):
                check_round_trip(file, raw)

    return Target("gguf", list(VALID.values()), feed)


def has_empty_list(value: Any) -> bool:
    """An empty list of lists has no type to be written with."""
    return isinstance(value, list) and (value == [] or any(map(has_empty_list, value)))


def check_round_trip(file: gguf.GGUFFile, raw: bytes) -> None:
    out = io.BytesIO()
    order = {"version": file.version, "byteorder": file.byteorder}
    gguf.write(out, file.exact_metadata, file.tensors, **order)
    ours = out.getvalue()
    n = min(len(ours), len(raw))
    padding = ours[n:] + raw[n:]
    if ours[:n] != raw[:n] or any(padding) or len(padding) >= file.alignment:
        raise AssertionError("the accepted file is written back with other bytes")


TARGETS: dict[str, Callable[[], Target]] = {"gguf": reader}
