"""What the writer refuses, and that write, open, write gives the same bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinyllm
from tinyllm import gguf
from tinyllm.errors import ArgumentError
from tinyllm.gguf.types import TYPES, VALUE_DTYPES

REFUSED_METADATA = {
    "": 1,
    "k" * 65536: 1,
    "a\nb": 1,
    "none": None,
    "complex": 1j,
    "dict": {},
    "set": {1},
    "large": 1 << 64,
    "small": -(1 << 63) - 1,
    "range": [-1, 1 << 63],
    "empty": [],
    "mixed": [1, "a"],
    "numbers": [1, 0.5],
    "nan": float("nan"),
    "infinite": np.float64("inf"),
    "overflow": 1e300,
    "matrix": np.zeros((2, 2), np.float32),
    "half": np.zeros(2, np.float16),
    "objects": np.array(["a"]),
    "surrogate": "\ud800",
    "general.architecture": "a/b",
}
REFUSED_TENSORS = {
    "": np.zeros(2, np.float32),
    "n" * 64: np.zeros(2, np.float32),
    "new\nline": np.zeros(2, np.float32),
    "scalar": np.zeros((), np.float32),
    "nothing": np.zeros((2, 0), np.float32),
    "five": np.zeros((1, 1, 1, 1, 1), np.float32),
    "unsigned": np.zeros(2, np.uint8),
    "unknown": gguf.RawTensor("Q9_9", (32,), np.zeros(18, np.uint8)),
    "row": gguf.RawTensor("Q4_0", (33,), np.zeros(18, np.uint8)),
    "short": gguf.RawTensor("Q4_0", (32,), np.zeros(17, np.uint8)),
}


@pytest.mark.parametrize("key", REFUSED_METADATA, ids=lambda k: repr(k[:20]))
def test_metadata_that_cannot_be_stored_is_refused(tmp_path, key):
    with pytest.raises(ArgumentError):
        gguf.write(tmp_path / "x.gguf", {key: REFUSED_METADATA[key]}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", REFUSED_TENSORS, ids=lambda k: repr(k[:20]))
def test_tensor_that_cannot_be_stored_is_refused(tmp_path, name):
    with pytest.raises(ArgumentError):
        gguf.write(tmp_path / "x.gguf", {}, {name: REFUSED_TENSORS[name]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [{"version": 1}, {"version": 4}, {"byteorder": "middle"}, {"alignment": 3}, {"alignment": 0}],
    ids=str,
)
def test_option_out_of_range_is_refused(options):
    with pytest.raises(ArgumentError):
        gguf.write(io.BytesIO(), {}, {}, **options)


def test_contradicting_alignment_is_refused():
    with pytest.raises(ArgumentError, match=r"general\.alignment is 64"):
        gguf.write(io.BytesIO(), {"general.alignment": 64}, {}, alignment=32)


def test_failure_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.gguf"
    gguf.write(path, {"k": 1}, {"w": np.ones(4, np.float32)})
    with gguf.open(path) as file:
        tensor = file.tensors["w"]
    old = path.read_bytes()
    with pytest.raises(ValueError, match="closed"):  # when half of the new file is written
        gguf.write(path, {"k": 2}, {"v": np.ones(4, np.float32), "w": tensor})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *((0, "U32"), (2**32 - 1, "U32"), (-1, "I32"), (2**32, "U64"), (-(2**31) - 1, "I64")),
        *((True, "BOOL"), (0.5, "F32"), ("a", "STRING"), (b"\xff", "STRING"), ([1], "ARRAY")),
        *((np.uint8(1), "U8"), (np.float64(0.1), "F64"), (np.bool_(1), "BOOL")),
    ],
)
def test_python_values_get_the_smallest_type(value, kind):
    out = io.BytesIO()
    gguf.write(out, {"k": value}, {})
    stored = int.from_bytes(out.getvalue()[24 + 9 :][:4], "little")
    assert gguf.types.VALUE_NAMES[stored] == kind


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1, 2], "U32"), ([-1, 2], "I32"), ([1, 1 << 40], "U64"), ([-1, 1 << 40], "I64")],
)
def test_lists_get_a_type_that_fits_all(values, kind):
    out = io.BytesIO()
    gguf.write(out, {"k": values}, {})
    stored = int.from_bytes(out.getvalue()[24 + 9 + 4 :][:4], "little")
    assert gguf.types.VALUE_NAMES[stored] == kind


TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.binary(max_size=20)
)
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=15).filter(
    lambda s: s != "general.architecture" and not s.startswith("split.")
)
NUMERIC = [d for d in VALUE_DTYPES.values() if d.kind != "b"]


def scalars(dtype):
    return hnp.arrays(
        dtype,
        (),
        elements={"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else None,
    ).map(lambda a: a[()])


ARRAYS = st.sampled_from(list(VALUE_DTYPES.values())).flatmap(
    lambda d: hnp.arrays(d, st.integers(0, 9))
)
STRINGS = st.lists(TEXT, max_size=9).map(gguf.StringArray.of)
FLAT = st.one_of(ARRAYS, STRINGS)
NESTED = st.recursive(FLAT, lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=4)
SCALARS = st.sampled_from(NUMERIC).flatmap(scalars)
VALUES = st.one_of(SCALARS, st.booleans().map(np.bool_), TEXT, NESTED)


@st.composite
def raw_tensors(draw):
    kind = TYPES[draw(st.sampled_from(sorted(TYPES)))]
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    n = int(np.prod(shape)) * kind.type_size
    shape[-1] *= kind.block_size
    seed = draw(st.integers(0, 99))
    raw = np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)
    return gguf.RawTensor(kind.name, tuple(shape), raw)


def reopened(path, raw):
    path.write_bytes(raw)
    out = io.BytesIO()
    with gguf.open(path) as file:
        gguf.write(
            out, file.exact_metadata, file.tensors, version=file.version, byteorder=file.byteorder
        )
    return out.getvalue()


@settings(max_examples=80, deadline=None)
@given(
    metadata=st.dictionaries(NAMES, VALUES, max_size=6),
    tensors=st.dictionaries(NAMES, raw_tensors(), max_size=4),
    version=st.sampled_from([2, 3]),
    byteorder=st.sampled_from(["little", "big"]),
    alignment=st.sampled_from([None, 1, 8, 32, 256]),
)
def test_write_open_write_is_the_identity(
    tmp_path_factory, metadata, tensors, version, byteorder, alignment
):
    out = io.BytesIO()
    gguf.write(out, metadata, tensors, version=version, byteorder=byteorder, alignment=alignment)
    path = tmp_path_factory.getbasetemp() / "round-trip.gguf"
    assert reopened(path, out.getvalue()) == out.getvalue()


@settings(max_examples=80, deadline=None)
@given(strings=st.lists(TEXT, max_size=30), orders=st.sampled_from(["little", "big"]))
def test_strings_come_back_in_every_way_of_reading(tmp_path_factory, strings, orders):
    expected = [s if isinstance(s, bytes) else s.encode() for s in strings]
    path = tmp_path_factory.getbasetemp() / "strings.gguf"
    gguf.write(path, {"k": gguf.StringArray.of(strings)}, {}, byteorder=orders)
    with gguf.open(path) as file:
        array = file.metadata["k"]
    assert array.tobytes_list() == expected
    assert [array.bytes(i) for i in range(len(array))] == expected
    assert [s.encode("utf-8", "surrogateescape") for s in array] == expected
    assert array.lengths().tolist() == [len(s) for s in expected]
    assert array == gguf.StringArray.of(strings)
    assert array[::-2].tobytes_list() == expected[::-2]


def test_many_strings_of_all_lengths(tmp_path):
    """Windows, the chain's breaks and what looks like a length inside a string."""
    rng = np.random.default_rng(0)
    strings = [bytes(rng.integers(1, 256, n, dtype=np.uint8)) for n in rng.integers(0, 40, 60_000)]
    for i in range(100, 60_000, 9001):
        strings[i] = b"\0" * 8
        strings[i + 1] = b"\0\0\0\0\0\0\5x\0\0\0\0\0\0\0\0y"
        strings[i + 2] = b"z" * (70_000 if i % 2 else 300)
    path = tmp_path / "x.gguf"
    gguf.write(path, {"k": gguf.StringArray.of(strings), "after": 7}, {})
    with gguf.open(path) as file:
        assert file.metadata["k"].tobytes_list() == strings
        assert file.metadata["after"] == 7
    long = [b"a", b"z" * (3 << 20), b"", b"y" * (1 << 20), b"b"]  # more than is fetched at a time
    gguf.write(path, {"k": long, "after": 7}, {})
    with gguf.open(path) as file:
        assert file.metadata["k"].tobytes_list() == long
        assert file.metadata["after"] == 7
    plain = [s for s in strings if s and b"\0" not in s]
    gguf.write(path, {"k": plain}, {})
    with gguf.open(path) as file:
        assert file.metadata["k"].tobytes_list() == plain
        assert file.metadata["k"].tolist() == [s.decode("utf-8", "surrogateescape") for s in plain]


@pytest.mark.parametrize("wrong", [None, 5, "x", [], ["a"], np.array([1, 2])])
def test_what_is_no_mapping_is_told(wrong: Any, tmp_path: Path) -> None:
    for name in ("metadata", "tensors"):
        with pytest.raises(ArgumentError, match=f"{name} is .*expected a mapping"):
            gguf.write(tmp_path / "x.gguf", **{"metadata": {}, "tensors": {}, name: wrong})
    with pytest.raises(ArgumentError, match="metadata is"):
        tinyllm.tokenizers.load(wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [None, 5, "x", b"x", [1.0], {}])
def test_what_is_no_tensor_or_name_is_told(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ArgumentError, match="expected an array, a RawTensor, a Deferred or a Tensor"
    ):
        gguf.write(tmp_path / "x.gguf", {}, {"a": wrong})
    for key in (5, None, b"x", (1,)):
        with pytest.raises(ArgumentError, match="expected a text"):
            gguf.write(tmp_path / "x.gguf", {key: 1}, {})
