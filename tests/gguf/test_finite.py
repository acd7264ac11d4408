"""NaN and infinity in a file are found where they are, in every type that can hold them."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest

import tinyllm
from tinyllm import gguf
from tinyllm.cli import commands as cli
from tinyllm.errors import GGUFError, NumericError
from tinyllm.gguf import finite, quants
from tinyllm.gguf.finite import check_finite
from tinyllm.loading import BUNDLED


@pytest.mark.parametrize("name", quants.FORMATS)
def test_blocks_are_refused_that_decode_to_no_number(name, tmp_path):
    fmt = quants.FORMATS[name]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (300, fmt.type_size), dtype=np.uint8)
    if name == "Q8_1":  # s serves dot products; the weights are without it
        raw[:, 2:4] = 0
    decoded = quants.dequantize(name, raw)
    bad = np.flatnonzero(~np.isfinite(decoded).all(-1))
    path = tmp_path / "x.gguf"
    gguf.write(path, {}, {"w": gguf.RawTensor(name, (300, fmt.block_size), raw.reshape(-1))})
    with gguf.open(path) as file:
        if len(bad):
            place = file.tensors["w"].offset + bad[0] * fmt.type_size
            with pytest.raises(GGUFError, match=rf"byte {place}, w: row {bad[0]}, weight"):
                check_finite(file)
        else:
            check_finite(file)
    good = np.delete(raw, bad, axis=0)
    gguf.write(path, {}, {"w": gguf.RawTensor(name, (len(good), fmt.block_size), good.reshape(-1))})
    with gguf.open(path) as file:
        check_finite(file)


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(finite, "PIECE", 1000)
    path, weights = tmp_path / "x.gguf", np.ones((50, 64), np.float32)
    weights[37, 5] = np.inf
    gguf.write(path, {}, {"good": np.ones(9, np.float32), "bad": weights})
    with gguf.open(path) as file, pytest.raises(GGUFError, match="bad: row 37, weight 5: NaN"):
        check_finite(file)


@pytest.fixture
def spoilt(tmp_path):
    """The bundled model with one scale that is no number, and the name of its tensor."""
    path = shutil.copy(BUNDLED, tmp_path / "spoilt.gguf")
    with gguf.open(path) as file:
        tensor = file.tensors["blk.1.ffn_down.weight"]
        fields = quants.FORMATS[tensor.type].dtype.fields
    with open(path, "r+b") as f:
        f.seek(tensor.offset + fields["d"][1])
        f.write(np.float16(np.nan).tobytes())
    return path


def test_loading_refuses_them_when_asked(spoilt, capsys):
    with pytest.raises(GGUFError, match=r"blk\.1\.ffn_down\.weight: row 0, weights 0 to"):
        tinyllm.load(spoilt, check_weights=True)
    tinyllm.load(check_weights=True).close()
    assert cli.main(["info", str(spoilt), "--check"]) == 1
    assert "blk.1.ffn_down.weight: row 0" in capsys.readouterr().err
    assert cli.main(["info", "--check"]) == 0
    assert re.search(r"all of \d+ tensors are finite", capsys.readouterr().out)


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_unasked_they_are_refused_before_a_token_is_chosen(spoilt, device, temperature):
    with np.errstate(all="ignore"), tinyllm.load(spoilt, device) as model:
        for stream in (False, True):
            with pytest.raises(NumericError, match="NaN or infinity"):
                list(model.generate("Once", temperature=temperature, stream=stream))
