"""Models split into several files."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tinyllm import gguf
from tinyllm.errors import ArgumentError, GGUFError

HEAD = {"general.architecture": "llama", "llama.block_count": 1, "names": ["a", "b"]}


def part(folder, i, n, tensors, *, name="m", total=3, **changes):
    path = folder / f"{name}-{i + 1:05}-of-{n:05}.gguf"
    keys = {
        "split.no": np.uint16(i),
        "split.count": np.uint16(n),
        "split.tensors.count": np.int32(total),
    }
    metadata = {**(HEAD if i == 0 else {}), **keys, **changes}
    gguf.write(path, {k: v for k, v in metadata.items() if v is not None}, tensors)
    return path


def tensor(value):
    return np.full(4, value, np.float32)


@pytest.fixture
def model(tmp_path):
    first = part(tmp_path, 0, 3, {"a": tensor(0)})
    part(tmp_path, 1, 3, {"b": tensor(1)})
    part(tmp_path, 2, 3, {"c": tensor(2)})
    return first


def test_the_first_part_opens_all(model):
    with gguf.open(model) as file:
        assert list(file.tensors) == ["a", "b", "c"]
        assert [t.dequantize()[0] for t in file.tensors.values()] == [0, 1, 2]
        assert file.metadata["llama.block_count"] == 1
        assert file.tensors["c"].path.endswith("m-00003-of-00003.gguf")
    with pytest.raises(ValueError, match="closed"):
        file.tensors["c"].read()


def test_equal_keys_in_later_parts_are_fine(model):
    part(model.parent, 1, 3, {"b": tensor(1)}, names=["a", "b"], **{"llama.block_count": 1})
    gguf.open(model).close()


def test_one_part_of_one_is_an_ordinary_file(tmp_path):
    path = tmp_path / "any name.gguf"
    part(tmp_path, 0, 1, {"a": tensor(0)}, total=1).rename(path)
    gguf.open(path).close()


REFUSED = {
    "part missing": (lambda m: os.remove(second(m)), "this part of a split model is missing"),
    "part malformed": (lambda m: second(m).write_bytes(b"GGUX"), "not a GGUF file"),
    "wrong number": (
        lambda m: part(m.parent, 1, 3, {"b": tensor(1)}, **{"split.no": np.uint16(2)}),
        "expected split.no = 1",
    ),
    "wrong count": (
        lambda m: part(m.parent, 1, 3, {"b": tensor(1)}, **{"split.count": np.uint16(2)}),
        "expected split.count = 3",
    ),
    "no number": (
        lambda m: part(m.parent, 1, 3, {"b": tensor(1)}, **{"split.no": None}),
        "expected split.no = 1",
    ),
    "number is text": (
        lambda m: part(m.parent, 1, 3, {"b": tensor(1)}, **{"split.no": "1"}),
        "split.no must be a number",
    ),
    "tensor missing": (lambda m: part(m.parent, 1, 3, {}), "3 tensors announced, 2 found"),
    "tensor twice": (
        lambda m: part(m.parent, 1, 3, {"a": tensor(1)}),
        "a: the tensor stands in two parts",
    ),
    "other key": (
        lambda m: part(m.parent, 1, 3, {"b": tensor(1)}, names=["a", "c"]),
        "names: differs from the first part",
    ),
    "new key": (
        lambda m: part(m.parent, 1, 3, {"b": tensor(1)}, new=1),
        "new: differs from the first part, or is missing there",
    ),
    "renamed": (lambda m: m.rename(m.parent / "x.gguf"), "NAME-00001-of-00003.gguf"),
    "not the first": (lambda m: second(m), "open .*m-00001-of-00003.gguf instead"),
    "negative": (
        lambda m: part(m.parent, 0, 3, {"a": tensor(0)}, **{"split.count": np.int32(-3)}),
        "split into -3",
    ),
    "too many": (
        lambda m: part(m.parent, 0, 2000, {"a": tensor(0)}, **{"split.count": np.uint16(2000)}),
        "at most 1000",
    ),
}


def second(model):
    return model.with_name("m-00002-of-00003.gguf")


@pytest.mark.parametrize("name", REFUSED)
def test_parts_that_do_not_fit_are_refused(model, name):
    change, message = REFUSED[name]
    changed = change(model)
    path = changed if name in ("renamed", "not the first", "too many") else model
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(GGUFError, match=message):
        gguf.open(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_model_is_written_in_parts_and_read_as_one(tmp_path):
    tensors = {name: np.arange(64, dtype=np.float32) + i for i, name in enumerate("abcde")}
    files = gguf.write(tmp_path / "w.gguf", HEAD, tensors, part_bytes=600)
    assert [os.path.basename(f) for f in files] == [f"w-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    with gguf.open(files[0]) as file:
        assert list(file.tensors) == list(tensors)
        assert all((file.tensors[n].dequantize() == x).all() for n, x in tensors.items())
        assert file.metadata["names"].tolist() == ["a", "b"]
    with gguf.open(files[0]) as file:  # tensors of an open file, into one piece again
        assert gguf.write(tmp_path / "whole.gguf", HEAD, dict(file.tensors)) == [
            os.fspath(tmp_path / "whole.gguf")
        ]
    with gguf.open(tmp_path / "whole.gguf") as file:
        assert all((file.tensors[n].dequantize() == x).all() for n, x in tensors.items())


def test_no_part_is_left_when_a_tensor_fails(tmp_path):
    def pieces():
        yield np.zeros(128, np.uint8)
        raise RuntimeError("the source is gone")

    tensors = {"a": tensor(0), "b": gguf.Deferred("F32", (64,), pieces)}
    with pytest.raises(RuntimeError, match="gone"):
        gguf.write(tmp_path / "w.gguf", HEAD, tensors, part_bytes=16)
    short = gguf.Deferred("F32", (64,), lambda: [np.zeros(128, np.uint8)])
    with pytest.raises(ArgumentError, match="128 bytes given"):
        gguf.write(tmp_path / "w.gguf", HEAD, {"b": short})
    assert list(tmp_path.iterdir()) == []
