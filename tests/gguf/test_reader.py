"""What the reader gives back of well-formed files."""

from __future__ import annotations

import io
import os
import threading

import numpy as np
import pytest

from tinyllm import gguf
from tinyllm.errors import ArgumentError, GGUFError
from tinyllm.gguf.types import TYPES

METADATA = {
    "general.architecture": "llama",
    "a.u8": np.uint8(200),
    "a.i8": np.int8(-3),
    "a.u16": np.uint16(60000),
    "a.i16": np.int16(-300),
    "a.u32": 7,
    "a.i32": -7,
    "a.u64": 1 << 40,
    "a.i64": -(1 << 40),
    "a.f32": 0.5,
    "a.f64": np.float64(0.1),
    "a.yes": True,
    "a.text": "naïve ☃",
    "a.ints": np.arange(5, dtype=np.int16),
    "a.floats": [0.5, -1.0],
    "a.bools": [True, False, True],
    "a.strings": ["", "b", b"\xe2\x82", b"\xac", "☃"],
    "a.nested": [[1, 2], ["x"], np.zeros(3, np.float32)],
}
ORDERS = pytest.mark.parametrize("byteorder", ["little", "big"])


def tensors(rng=None):
    rng = rng or np.random.default_rng(0)
    return {
        "matrix.weight": rng.standard_normal((3, 64)).astype(np.float32),
        "half.weight": rng.standard_normal((2, 2, 32)).astype(np.float16),
        "odd": np.arange(5, dtype=np.int8),
        "long": np.arange(3, dtype=np.int64),
        "blocks.weight": gguf.RawTensor("Q4_0", (2, 64), rng.integers(0, 256, 72, dtype=np.uint8)),
    }


def written(path, *args, **kwargs):
    gguf.write(path, *args, **kwargs)
    return gguf.open(path)


@ORDERS
@pytest.mark.parametrize("version", [2, 3])
def test_metadata_and_tensors_come_back(tmp_path, version, byteorder):
    given = tensors()
    path = tmp_path / "model.gguf"
    with written(path, METADATA, given, version=version, byteorder=byteorder) as file:
        assert (file.version, file.byteorder, file.alignment) == (version, byteorder, 32)
        assert list(file.metadata) == list(METADATA)
        for key in METADATA:
            value = file.metadata[key]
            expected = METADATA[key]
            if key == "a.strings":
                assert value.tobytes_list() == [b"", b"b", b"\xe2\x82", b"\xac", "☃".encode()]
            elif key == "a.nested":
                assert [list(v) for v in value] == [[1, 2], ["x"], [0, 0, 0]]
            else:
                assert np.array_equal(value, expected), key
        for name in ("matrix.weight", "half.weight", "odd", "long"):
            tensor, array = file.tensors[name], given[name]
            assert tensor.shape == array.shape
            assert np.array_equal(tensor.read().view(array.dtype).reshape(array.shape), array)
            assert np.array_equal(tensor.raw.reshape(-1), tensor.read())
        assert file.tensors["blocks.weight"].type == "Q4_0"
        assert np.array_equal(file.tensors["blocks.weight"].read(), given["blocks.weight"].raw)


def test_scalars_are_python_and_arrays_native(tmp_path):
    with written(tmp_path / "x.gguf", METADATA, {}, byteorder="big") as file:
        kinds = {k: type(file.metadata[k]) for k in ("a.u8", "a.f32", "a.f64", "a.yes", "a.text")}
        assert list(kinds.values()) == [int, float, float, bool, str]
        assert file.metadata["a.ints"].dtype == np.dtype(np.int16)
        assert file.metadata["a.bools"].dtype == np.bool_
        with pytest.raises(TypeError):
            file.metadata["a.u8"] = 1


def test_strings_keep_bytes_that_are_no_text(tmp_path):
    with written(tmp_path / "x.gguf", METADATA, {}) as file:
        strings = file.metadata["a.strings"]
    assert strings.bytes(2) == b"\xe2\x82"
    assert strings[4] == "☃"
    assert strings[-1] == "☃"
    assert strings.tolist()[2].encode("utf-8", "surrogateescape") == b"\xe2\x82"
    assert strings[1:3].tobytes_list() == [b"b", b"\xe2\x82"]
    assert len(set(strings)) == 5
    assert strings.lengths().tolist() == [0, 1, 2, 1, 3]
    assert "b" in strings
    assert strings == ["", "b", "\udce2\udc82", "\udcac", "☃"]
    assert strings != ["b"]
    assert strings != 5
    assert repr(strings[:2]) == "StringArray(['', 'b'], n=2)"
    with pytest.raises(IndexError):
        strings[5]


@ORDERS
@pytest.mark.parametrize("name", TYPES)
def test_every_tensor_type_is_written_and_read(tmp_path, name, byteorder):
    kind = TYPES[name]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (3, 2 * kind.type_size), dtype=np.uint8)
    tensor = gguf.RawTensor(name, (3, 2 * kind.block_size), raw)
    path = tmp_path / "x.gguf"
    with written(path, {}, {"w": tensor, "after": tensor}, byteorder=byteorder) as file:
        got = file.tensors["after"]
        assert (got.type, got.shape, got.nbytes) == (name, (3, 2 * kind.block_size), raw.size)
        assert got.row_nbytes == 2 * kind.type_size
        assert np.array_equal(got.read_rows(1, 3), raw[1:3])
        assert np.array_equal(got.raw, raw)
        assert not got.raw.flags.writeable


def test_reading_into_given_memory(tmp_path):
    given = np.arange(12, dtype=np.float32).reshape(3, 4)
    with written(tmp_path / "x.gguf", {}, {"w": given}) as file:
        tensor, out = file.tensors["w"], np.empty(48, np.uint8)
        assert tensor.read(out) is out
        assert np.array_equal(out.view(np.float32), given.reshape(-1))
        rows = np.zeros((2, 16), np.uint8)
        tensor.read_rows(1, 3, rows)
        assert np.array_equal(rows.view(np.float32), given[1:])
        for bad in (np.empty(47, np.uint8), np.empty(48, np.int8), np.empty(96, np.uint8)[::2]):
            with pytest.raises(ArgumentError, match="contiguous uint8 of 48 bytes"):
                tensor.read(bad)
        for start, stop in ((-1, 2), (2, 1), (0, 4)):
            with pytest.raises(ArgumentError, match="rows"):
                tensor.read_rows(start, stop)


def test_dequantize_gives_floats(tmp_path):
    given = np.arange(12, dtype=np.float32).reshape(3, 4)
    for byteorder in ("little", "big"):
        with written(tmp_path / "x.gguf", {}, {"w": given}, byteorder=byteorder) as file:
            values = file.tensors["w"].dequantize()
        assert values.dtype == np.float32
        assert np.array_equal(values, given)


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_alignment_is_kept(tmp_path, alignment):
    path = tmp_path / "x.gguf"
    with written(path, {}, tensors(), alignment=alignment) as file:
        assert file.alignment == alignment == file.metadata["general.alignment"]
        assert all(t.offset % alignment == 0 for t in file.tensors.values())
        assert np.array_equal(file.tensors["odd"].read(), np.arange(5))


def test_views_outlive_the_file_and_reads_do_not(tmp_path):
    with written(tmp_path / "x.gguf", {}, {"w": np.arange(4, dtype=np.float32)}) as file:
        tensor = file.tensors["w"]
        view = tensor.raw
    assert np.array_equal(view.view(np.float32), np.arange(4))
    with pytest.raises(ValueError, match="closed"):
        tensor.read()
    with pytest.raises(ValueError, match="closed"):
        _ = tensor.raw


def test_reading_from_several_threads(tmp_path):
    rows = np.arange(64 * 256, dtype=np.float32).reshape(64, 256)
    with written(tmp_path / "x.gguf", {}, {"w": rows}) as file:
        wrong = []

        def read(seed):
            for i in np.random.default_rng(seed).integers(0, 64, 200):
                row = file.tensors["w"].read_rows(int(i), int(i) + 1).view(np.float32)
                if not np.array_equal(row[0], rows[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=read, args=(s,)) for s in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert wrong == []


def test_shrunken_file_is_an_error_and_not_a_crash(tmp_path):
    path = tmp_path / "x.gguf"
    with written(path, {}, {"w": np.ones((64, 1024), np.float32)}) as file:
        os.truncate(path, 100_000)
        for touch in (lambda t: t.read(), lambda t: t.raw, lambda t: t.read_rows(60, 64)):
            with pytest.raises(GGUFError, match="shrunk"):
                touch(file.tensors["w"])
        assert file.tensors["w"].read_rows(0, 2).size == 8192


def test_reading_without_positioned_reads(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "preadv")  # as on Windows
    path = tmp_path / "x.gguf"
    with written(path, METADATA, {"w": np.arange(999, dtype=np.float32)}) as file:
        assert file.metadata["a.strings"][4] == "☃"
        assert np.array_equal(file.tensors["w"].dequantize(), np.arange(999))
        os.truncate(path, 2000)
        with pytest.raises(GGUFError, match="shrunk"):
            file.tensors["w"].read()


def test_replaced_file_has_no_effect(tmp_path):
    path = tmp_path / "x.gguf"
    with written(path, {}, {"w": np.ones(8, np.float32)}) as file:
        gguf.write(path, {}, {"w": np.zeros(8, np.float32)})
        assert file.tensors["w"].read().view(np.float32).tolist() == [1] * 8


@pytest.mark.parametrize("name", ["directory", "pipe", "/dev/zero", "loop"])
def test_what_is_no_file_is_refused(tmp_path, name):
    path = tmp_path / name if "/" not in name else name
    if name == "directory":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    elif name == "loop":
        path.symlink_to(path)
    with pytest.raises(GGUFError, match=r"regular file|leads back"):
        gguf.open(path)


def test_missing_file_is_the_usual_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        gguf.open(tmp_path / "none.gguf")


def test_path_with_a_zero_byte_is_refused():
    with pytest.raises(ArgumentError, match="is no name of a file"):
        gguf.open("a\0b")


def test_failed_open_leaves_nothing_open(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(GGUFError):
            gguf.open(path)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_real_files_open(data):
    paths = [
        *data.glob("models/*.gguf"),
        *data.glob("golden/*/*.gguf"),
        *data.glob("tokenizers/*.gguf"),
    ]
    assert len(paths) > 100
    for path in paths:
        with gguf.open(path) as file:
            assert file.metadata["general.architecture"]


def test_reading_equals_the_reference_package(data):
    reference = pytest.importorskip("gguf")
    path = data / "models" / "stories260K.gguf"
    theirs = reference.GGUFReader(path)
    with gguf.open(path) as ours:
        fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
        assert list(ours.metadata) == list(fields)
        for key, field in fields.items():
            value = ours.metadata[key]
            plain = value.tolist() if hasattr(value, "tolist") else value
            assert plain == field.contents(), key
        assert list(ours.tensors) == [t.name for t in theirs.tensors]
        for t in theirs.tensors:
            mine = ours.tensors[t.name]
            assert mine.shape == tuple(reversed(t.shape.tolist()))
            assert np.array_equal(mine.read(), np.asarray(t.data).view(np.uint8).reshape(-1))


def test_other_malformed_data_is_refused(data):
    paths = sorted((data / "malformed").iterdir())
    good = [path for path in paths if path.name in ("v3-empty.bin", "valid-small.gguf")]
    assert (len(paths), len(good)) == (12, 2)
    for path in good:
        gguf.open(path).close()
    for path in set(paths) - set(good):
        with pytest.raises(GGUFError) as caught:
            gguf.open(path)
        assert caught.value.offset is not None
        assert str(path) in str(caught.value)


def test_errors_about_values_are_located(tmp_path):
    path = tmp_path / "x.gguf"
    with written(path, METADATA, tensors()) as file:
        key = file.located(GGUFError("is odd", name="a.u8"))
        tensor = file.located(GGUFError("is odd", name="odd"))
        absent = file.located(GGUFError("is missing", name="b"))
    assert str(key) == f"{path}, byte {file.key_offsets['a.u8']}, a.u8: is odd"
    assert str(tensor) == f"{path}, byte {file.tensors['odd'].offset}, odd: is odd"
    assert str(absent) == f"{path}, b: is missing"
    assert file.located(key) is key
    start = file.key_offsets["a.u8"] + 8
    assert path.read_bytes()[start : start + 4] == b"a.u8"


def test_written_to_an_open_file(tmp_path):
    out = io.BytesIO()
    gguf.write(out, METADATA, tensors())
    path = tmp_path / "x.gguf"
    gguf.write(path, METADATA, tensors())
    assert path.read_bytes() == out.getvalue()
