"""Every malformed file is refused with an error that says where, without taking memory for what it claims."""

from __future__ import annotations

import tracemalloc

import pytest
from malformed import VALID, cases

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
