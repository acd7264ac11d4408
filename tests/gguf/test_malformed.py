"""Every malformed file is refused with an error that says where, without taking memory for what it claims."""

from __future__ import annotations

import os
import tracemalloc

import pytest
from malformed import VALID, array, cases, one_key, one_tensor, preamble, text

from tinyllm import gguf
from tinyllm.errors import GGUFError

CASES = list(cases())


def test_the_table_is_large_and_named_apart():
    names = [name for name, _, _ in CASES]
    assert len(names) >= 150
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", VALID)
def test_what_the_cases_start_from_opens(tmp_path, name):
    path = tmp_path / "x.gguf"
    path.write_bytes(VALID[name])
    gguf.open(path).close()


@pytest.mark.parametrize("name", VALID)
def test_a_file_cut_anywhere_is_refused(tmp_path, name):
    path, raw = tmp_path / "x.gguf", VALID[name]
    complete = len(raw) - (16 if name in ("model", "big-endian", "version-2") else 0)
    for n in range(len(raw)):
        path.write_bytes(raw[:n])
        if n < complete:
            with pytest.raises(GGUFError):
                gguf.open(path)
        else:  # the padding after the last tensor may be missing
            gguf.open(path).close()


SPARSE = {  # the beginning of a file of 9 GiB that is otherwise a hole
    "strings": (one_key(array("STRING", 10**9), "ARRAY"), "k: more than 2097152 strings"),
    "numbers": (one_key(array("U64", 10**9), "ARRAY"), "k: 1000000000 U64 ends beyond"),
    "string": (one_key(text(b"", 1 << 32), "STRING"), "k: the string is said to have 4294967296"),
    "some strings": (
        one_key(array("STRING", 2, text(b"a") + text(b"", 1 << 32)), "ARRAY"),
        "k: string 1 is said to have 4294967296 bytes, but at most",
    ),
    "tensor": (one_tensor((1 << 20,), n_data=0), "bytes follow the last tensor"),
    "nothing": (preamble(0, 0), "bytes follow the last tensor"),
}


@pytest.mark.parametrize("name", SPARSE)
def test_large_hole_is_not_read(tmp_path, name):
    start, message = SPARSE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(start)
    os.truncate(path, 9 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match=message):
            gguf.open(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize(("raw", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_malformed_file_is_refused(tmp_path, raw, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError) as caught:
            gguf.open(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    error = caught.value
    assert message in str(error)
    assert error.path == str(path)
    assert error.offset is not None
    assert 0 <= error.offset <= len(raw)
    assert len(str(error)) < 600
    assert peak < (4 << 20) + 4 * len(raw)
