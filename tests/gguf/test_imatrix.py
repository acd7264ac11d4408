"""Importance matrices: what the products read, in llama.cpp's files, and quantisers that use it."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

import tinyllm
from tinyllm import gguf
from tinyllm.errors import ArgumentError, GGUFError
from tinyllm.gguf import quants
from tinyllm.gguf.imatrix import Importance, read_imatrix, write_imatrix
from tinyllm.gguf.mixtures import MIXTURES, plan
from tinyllm.loading import BUNDLED

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))
from make_convert import write_safetensors  # noqa: E402

TEXT = "Once upon a time there was a little cat. She had a red ball, and Tom had a big dog. " * 20
WRITTEN = [n for n, f in quants.FORMATS.items() if f.quantize and f.int8_form]
ALIKE = ("Q8_0", "Q8_1", "Q8_K")  # nothing to choose: the largest value gives the scale


def test_it_is_the_mean_square_of_what_each_product_reads(tmp_path: Path) -> None:
    out = tmp_path / "i.gguf"
    found = tinyllm.imatrix(BUNDLED, TEXT, out, window=64, n_windows=3)
    expected = dict.fromkeys(("attn_norm", "ffn_norm", "attn_heads"), 0.0)
    with tinyllm.load(BUNDLED) as m:
        ids = m.tokenizer.encode(TEXT, parse_special=False)
        for i in range(3):
            part = list(ids[64 * i : 64 * i + 64])
            if m.tokenizer.add_bos:
                part[0] = m.tokenizer.bos
            seen: dict[str, np.ndarray] = {}
            m.logits(part, tap=lambda name, x, seen=seen: seen.update({name: np.array(x)}))
            for key in expected:
                squares = np.square(seen[f"blk.1.{key}"], dtype=np.float64)
                expected[key] = expected[key] + squares.reshape(64, -1).sum(0) / 192
    pairs = {
        "attn_q": "attn_norm",
        "attn_v": "attn_norm",
        "ffn_up": "ffn_norm",
        "attn_output": "attn_heads",
    }
    for ours, tap in pairs.items():
        means = found.means(f"blk.1.{ours}.weight")
        assert means is not None
        np.testing.assert_allclose(means[0], expected[tap], rtol=2e-3)
    assert (found.chunks, found.chunk_size) == (3, 64)
    with gguf.open(BUNDLED) as file:
        inside = {n for n, t in file.tensors.items() if n.startswith("blk.") and len(t.shape) == 2}
    assert set(found.sums) == inside
    again = read_imatrix(out)
    assert again.datasets == ["text"]
    for name in inside:
        np.testing.assert_allclose(again.means(name), found.means(name), rtol=1e-6)


def test_experts_have_rows_of_their_own(tmp_path: Path) -> None:
    stored = json.loads(gzip.decompress((DATA / "convert.json.gz").read_bytes()))
    model, folder = stored["models"]["mixtral"], tmp_path / "mixtral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model["config"]))
    for file, text in stored["vocabularies"][model["vocabulary"]].items():
        (folder / file).write_bytes(text.encode("latin-1"))
    write_safetensors(folder / "model.safetensors", model["shapes"])
    tinyllm.convert(folder, tmp_path / "m.gguf")
    found = tinyllm.imatrix(tmp_path / "m.gguf", TEXT, window=32, n_windows=2)
    n, k = model["config"]["num_local_experts"], model["config"]["num_experts_per_tok"]
    for name, width in (("ffn_gate_exps", 64), ("ffn_up_exps", 64)):
        assert found.sums[f"blk.1.{name}.weight"].shape == (n, width)
        assert found.counts[f"blk.1.{name}.weight"].sum() == 2 * 32 * k
    # gate and up read the same; each row went to k experts, and the router read each once
    sums = found.sums["blk.1.ffn_gate_exps.weight"]
    assert np.array_equal(sums, found.sums["blk.1.ffn_up_exps.weight"])
    np.testing.assert_allclose(
        sums.sum(0), k * found.sums["blk.1.ffn_gate_inp.weight"][0], rtol=1e-5
    )
    types = tinyllm.quantize(tmp_path / "m.gguf", tmp_path / "q.gguf", "MXFP4_MOE", imatrix=found)
    assert types["blk.1.ffn_gate_exps.weight"] == "MXFP4"


@pytest.mark.parametrize("ending", ["gguf", "dat"])
def test_both_kinds_of_files_are_read_as_written(ending: str, tmp_path: Path) -> None:
    found, rng = Importance(datasets=["wiki.txt"], chunks=5), np.random.default_rng(0)
    found.add("blk.0.attn_q.weight", rng.random((1, 8)) * 100, np.array([64.0]))
    found.add("blk.0.ffn_up_exps.weight", rng.random((3, 8)), np.array([7.0, 0.0, 2.0]))
    write_imatrix(tmp_path / f"x.{ending}", found)
    again = read_imatrix(tmp_path / f"x.{ending}")
    assert (again.datasets, again.chunks) == (["wiki.txt"], 5)
    for name in found.sums:
        a, b = found.means(name), again.means(name)
        assert a is not None
        assert b is not None
        np.testing.assert_allclose(a.reshape(-1), b.reshape(-1), rtol=1e-6)
    if (
        ending == "dat"
    ):  # entries, the first one's name, calls, values; at the end calls and the text's name
        data = (tmp_path / "x.dat").read_bytes()
        assert struct.unpack("<ii", data[:8]) == (2, len("blk.0.attn_q.weight"))
        assert data.endswith(struct.pack("<ii", 5, 8) + b"wiki.txt")


@pytest.mark.parametrize("name", WRITTEN)
def test_errors_that_count_become_smaller(name: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_t(6, (16, 512)).astype(np.float32)
    w = np.exp(rng.normal(0, 1.5, 512)).astype(np.float32)
    plain, better = (
        float((w * np.square(quants.dequantize(name, quants.quantize(name, x, i)) - x)).sum())
        for i in (None, w)
    )
    assert better <= plain if name in ALIKE else better < 0.99 * plain
    zero = np.zeros(512, np.float32)
    assert np.isfinite(quants.dequantize(name, quants.quantize(name, x, zero))).all()


def test_a_file_is_quantised_by_importance(tmp_path: Path) -> None:
    with gguf.open(BUNDLED) as file:
        wide = {n: t.dequantize() for n, t in file.tensors.items()}
        gguf.write(tmp_path / "wide.gguf", file.exact_metadata, wide)
    found = tinyllm.imatrix(tmp_path / "wide.gguf", TEXT, window=64)
    write_imatrix(tmp_path / "i.gguf", found)
    types = tinyllm.quantize(
        tmp_path / "wide.gguf", tmp_path / "with.gguf", "Q4_K_M", imatrix=tmp_path / "i.gguf"
    )
    tinyllm.quantize(tmp_path / "wide.gguf", tmp_path / "without.gguf", "Q4_K_M")
    gained = 0
    with gguf.open(tmp_path / "with.gguf") as a, gguf.open(tmp_path / "without.gguf") as b:
        for name, means in ((n, found.means(n)) for n in found.sums):
            if types[name] in ("F16", *ALIKE):
                continue
            ours, theirs = (
                (means * np.square(f.tensors[name].dequantize() - wide[name])).sum() for f in (a, b)
            )
            assert ours <= 1.001 * theirs, name
            gained += ours < 0.995 * theirs
    assert gained > 10


def test_tensors_are_kept_or_given_types_by_pattern(tmp_path: Path) -> None:
    out = tmp_path / "q.gguf"
    with gguf.open(BUNDLED) as file:
        wide = {n: t.dequantize() for n, t in file.tensors.items()}
        gguf.write(tmp_path / "wide.gguf", file.exact_metadata, wide)
    rules = {"keep": [r"blk\.0\."], "types": {"ffn_down": "q5_0", r"attn_[qk]\.": "Q8_0"}}
    types = tinyllm.quantize(tmp_path / "wide.gguf", out, "Q4_0", **rules)
    assert types["blk.0.ffn_down.weight"] == "F32"
    assert types["blk.1.ffn_down.weight"] == "Q5_0"
    assert types["blk.1.attn_q.weight"] == "Q8_0"
    assert types["blk.1.ffn_up.weight"] == "Q4_0"
    for more, message in (
        ({"keep": ["nothing"]}, "no tensor's name has a match of 'nothing'"),
        ({"keep": ["("]}, "is no regular expression"),
        ({"types": {"ffn_up": "Q9"}}, "no type 'Q9'; we write"),
        ({"types": {"ffn_up": "I8"}}, "cannot be written as 'I8'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            tinyllm.quantize(tmp_path / "wide.gguf", out, "Q4_0", **more)  # type: ignore[arg-type]


def test_norms_get_no_type_by_pattern(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"blk.0.attn_norm.weight": (256,), "blk.0.ffn_gate_inp.weight": (4, 256),
              "blk.0.ffn_up.weight": (8, 256), "token_embd.weight": (8, 256)}  # fmt: skip
    tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    gguf.write(tmp_path / "a.gguf", {"general.architecture": "llama"}, tensors)
    for pattern in ("norm", "gate_inp"):
        with pytest.raises(ArgumentError, match="is no matrix that is quantised"):
            tinyllm.quantize(
                tmp_path / "a.gguf", tmp_path / "b.gguf", "Q8_0", types={pattern: "Q4_K"}
            )
    types = tinyllm.quantize(
        tmp_path / "a.gguf", tmp_path / "b.gguf", "Q8_0", types={"blk": "q4_k"}
    )
    assert types == {"blk.0.attn_norm.weight": "F32", "blk.0.ffn_gate_inp.weight": "F32",
                     "blk.0.ffn_up.weight": "Q4_K", "token_embd.weight": "Q8_0"}  # fmt: skip


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    other, wrong = Importance(), Importance()
    other.add("x", np.ones((1, 4)), np.ones(1))
    wrong.add("blk.0.attn_q.weight", np.ones((1, 4)), np.ones(1))
    for found, message in ((other, "names no tensor"), (wrong, r"has 4 values")):
        with pytest.raises(GGUFError, match=message):
            tinyllm.quantize(BUNDLED, tmp_path / "q.gguf", "F16", imatrix=found)
    with pytest.raises(GGUFError, match="expected an importance matrix"):
        read_imatrix(BUNDLED)
    (tmp_path / "x.dat").write_bytes(struct.pack("<ii", 1, 1 << 30))
    with pytest.raises(GGUFError, match="a count is 1073741824"):
        read_imatrix(tmp_path / "x.dat")
    (tmp_path / "y.dat").write_bytes(struct.pack("<ii", 1, 4) + b"ab")
    with pytest.raises(GGUFError, match="the file ends too early"):
        read_imatrix(tmp_path / "y.dat")
    with pytest.raises(ArgumentError, match="expected some thousands"):
        tinyllm.imatrix(BUNDLED, "")


def test_mixtures_do_with_fewer_bits_where_importance_is_known() -> None:
    shapes = {f"blk.{i}.ffn_down.weight": (256, 256) for i in range(16)}
    model = {"general.architecture": "llama", "llama.block_count": 16}
    assert plan(model, shapes, "IQ4_XS")["blk.0.ffn_down.weight"] == "Q5_K"
    assert plan(model, shapes, "IQ4_XS", True)["blk.0.ffn_down.weight"] == "IQ4_XS"
    assert plan(model, shapes, "IQ3_XXS")["blk.9.ffn_down.weight"] == "Q3_K"
    assert plan(model, shapes, "IQ3_XXS", True)["blk.9.ffn_down.weight"] == "IQ3_XXS"
    assert plan(model, shapes, "Q4_0", True)["blk.1.ffn_down.weight"] == "Q4_1"
    assert {m.file_type for m in MIXTURES.values()} >= set(range(19, 32))


def test_no_source_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tinyllm.cli import main

    model, text = tmp_path / "m.gguf", tmp_path / "text.txt"
    model.write_bytes(BUNDLED.read_bytes())
    text.write_text(TEXT)
    for words in (
        ["imatrix", model, text, "-o", model],
        ["imatrix", model, text, "-o", text],
        ["control", model, text, text, "-o", model],
        ["control", model, text, text, "-o", text],
    ):
        assert main([str(w) for w in words]) == 2
        assert f"{words[-1]} is the source itself; give another name" in capsys.readouterr().err
    assert (model.read_bytes(), text.read_text()) == (BUNDLED.read_bytes(), TEXT)


def test_the_command_writes_what_quantize_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tinyllm.cli import main

    (tmp_path / "text.txt").write_text(TEXT)
    out = str(tmp_path / "i.gguf")
    words = [
        "imatrix",
        str(BUNDLED),
        str(tmp_path / "text.txt"),
        "-o",
        out,
        "--window",
        "64",
        "--n-windows",
        "2",
    ]
    assert main(words) == 0
    assert "2 pieces of text" in capsys.readouterr().out
    more = [
        "--requantize",
        "--imatrix",
        out,
        "--keep",
        "token_embd",
        "--tensor-type",
        "attn_v=Q8_0",
    ]
    assert main(["quantize", str(BUNDLED), str(tmp_path / "q.gguf"), "Q4_0", *more]) == 0
    assert main(["quantize", str(BUNDLED), str(tmp_path / "q.gguf"), "--tensor-type", "x"]) == 2
