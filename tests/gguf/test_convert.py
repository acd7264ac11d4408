"""Folders of safetensors become the files that llama.cpp's converter writes of them."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm import gguf, tokenizers
from tinyllm.errors import ArgumentError, GGUFError, NumericError, UnsupportedModel
from tinyllm.gguf.convert.safetensors import as_float32, read_folder
from tinyllm.gguf.convert.splitting import recognise

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))
from make_convert import (  # noqa: E402
    IDS,
    LLAMA3,
    QWEN2,
    TEXTS,
    kind_of,
    shortened,
    weights,
    write_safetensors,
)

STORED = json.loads(gzip.decompress((DATA / "convert.json.gz").read_bytes()))
MODELS = STORED["models"]
RUN = [name for name, model in MODELS.items() if model["logits"]]

# Keys that differ on purpose, each with its reason.
GUESSED = {  # from the number of weights and the folder's name; we only take the name as it is
    "general.name", "general.size_label", "general.basename", "general.finetune", "general.version",
}  # fmt: skip
DIFFER = {
    # the tokenizer's configuration names the token; llama.cpp looks it up in tokenizer.json only
    **{(n, "tokenizer.ggml.unknown_token_id"): 0
       for n in ("mistral", "mixtral", "gemma", "gemma2", "gemma3", "phi3", "phi3long")},
    ("gemma", "tokenizer.ggml.eot_token_id"): None,  # CodeGemma's; readers find it by its spelling
    # an added token's marks of spaces become spaces, as in all other families
    **{(n, "tokenizer.ggml.tokens"): ... for n in ("phi3", "phi3long")},
    ("gptneox", "general.file_type"): 1,
    ("gptneox", "gptneox.rope.freq_base"): 10000.0,
    # readers of ours follow it; llama.cpp has no window in llama's models
    ("mistral", "llama.attention.sliding_window"): ["whole", 64],
    ("mistral", "llama.attention.sliding_window_pattern"): ["ARRAY", [True, True]],
    **{(n, "falcon.context_length"): 256 for n in ("falcon7", "falcon40")},  # as config.json says
    ("modernbert", "modern-bert.attention.layer_norm_epsilon"): pytest.approx(1e-5),  # readers need it
}  # fmt: skip


def folder_of(name: str, top: Path) -> Path:
    """The folder that the reference was converted from."""
    model, folder = MODELS[name], top / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model["config"]))
    for file, text in STORED["vocabularies"][model["vocabulary"]].items():
        (folder / file).write_bytes(text.encode("latin-1"))
    write_safetensors(folder / "model.safetensors", model["shapes"])
    return folder


def described(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys and tensors in the form of the stored reference."""
    keys = {}
    with gguf.open(path) as file:
        for key, value in file.exact_metadata.items():
            kind = "ARRAY" if not isinstance(value, (np.generic, str)) else kind_of(
                {"str_": "STRING", "str": "STRING", "float32": "FLOAT32", "bool": "BOOL"}.get(
                    value.dtype.name if isinstance(value, np.generic) else "str", "INT"))  # fmt: skip
            keys[key] = [kind, shortened(value.tolist() if hasattr(value, "tolist") else value)]
        tensors = {
            n: [t.type, list(t.shape), hashlib.sha256(t.read().tobytes()).hexdigest()[:16]]
            for n, t in file.tensors.items()
        }
    return keys, tensors


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_becomes_what_llama_cpp_makes_of_it(name: str, tmp_path: Path) -> None:
    types = tinyllm.convert(folder_of(name, tmp_path), tmp_path / "out.gguf")
    keys, tensors = described(tmp_path / "out.gguf")
    expected = dict(MODELS[name]["tensors"])
    assert types == {n: t[0] for n, t in tensors.items()}
    if name == "mamba":  # exponentials: NumPy's are rounded right, torch's nearly
        for i in range(2):
            place = f"blk.{i}.ssm_a"
            x = weights(f"backbone.layers.{i}.mixer.A_log", [128, 8], "F32").astype(np.float64)
            with gguf.open(tmp_path / "out.gguf") as file:
                assert (file.tensors[place].dequantize() == -np.exp(x).astype(np.float32)).all()
            assert tensors.pop(place)[:2] == expected.pop(place)[:2]
    assert tensors == expected
    wanted = {k: v for k, v in MODELS[name]["keys"].items() if k not in GUESSED}
    found = {k: v for k, v in keys.items() if k not in GUESSED}
    for (who, key), value in DIFFER.items():
        if who == name:
            here, there = found.pop(key, None), wanted.pop(key, None)
            assert here != there
            assert value is ... or value in (here, here and here[1])
    assert found == wanted
    assert keys["general.name"] == ["STRING", name]


@pytest.mark.parametrize("name", RUN)
def test_a_converted_model_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    tinyllm.convert(folder_of(name, tmp_path), tmp_path / "out.gguf", "F32")
    expected = np.array(MODELS[name]["logits"])
    with tinyllm.load(tmp_path / "out.gguf", "reference", kv_type="f32") as model:
        if model.config.causal:
            found = model.logits(IDS)
        else:
            found = model.embed_ids(IDS, pooling="none", normalize=False)
        assert np.abs(found[-1, :32] - expected).max() < 2e-5 * expected.std()


@pytest.mark.parametrize("name", STORED["encoded"])
def test_a_converted_vocabulary_gives_the_ids_of_its_own_library(name: str, tmp_path: Path) -> None:
    model = next(n for n, m in MODELS.items() if m["vocabulary"] == name)
    tinyllm.convert(folder_of(model, tmp_path), tmp_path / "out.gguf")
    with gguf.open(tmp_path / "out.gguf") as file:
        tokenizer = tokenizers.load(file.metadata)
    texts = TEXTS
    if name.startswith("spm"):  # the library knows nothing of tokens that were added beside it
        texts = [t for t in TEXTS if "<|" not in t]
    ids = dict(zip(TEXTS, STORED["encoded"][name], strict=True))
    assert [tokenizer.encode(t, add_special=False) for t in texts] == [ids[t] for t in texts]


# ---- types, parts, memory


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_K_M", "F32"])
def test_types(kind: str, tmp_path: Path) -> None:
    folder = folder_of("qwen2", tmp_path)
    types = tinyllm.convert(folder, tmp_path / "direct.gguf", kind)
    tinyllm.convert(folder, tmp_path / "f32.gguf", "F32")
    assert types == tinyllm.quantize(tmp_path / "f32.gguf", tmp_path / "twice.gguf", kind)
    assert described(tmp_path / "direct.gguf") == described(tmp_path / "twice.gguf")


def test_shards_are_read_as_one_and_parts_written(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    tinyllm.convert(folder, tmp_path / "one.gguf")
    shapes = MODELS["llama"]["shapes"]
    half = len(shapes) // 2
    names = [dict(list(shapes.items())[:half]), dict(list(shapes.items())[half:])]
    (folder / "model.safetensors").unlink()
    index: dict[str, Any] = {"weight_map": {}}
    for i, part in enumerate(names):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        write_safetensors(folder / file, part)
        index["weight_map"].update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    seen = []
    tinyllm.convert(
        folder, tmp_path / "out.gguf", part_bytes=60_000, report=lambda *call: seen.append(call)
    )
    files = sorted(tmp_path.glob("out-*.gguf"))
    assert len(files) > 2
    one, parts = (described(f)[1] for f in (tmp_path / "one.gguf", files[0]))
    assert parts == one
    assert dict(seen) == {n: t[0] for n, t in one.items()}
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        GGUFError, match=r"names model-00002-of-00002.safetensors, which is missing"
    ):
        tinyllm.convert(folder, tmp_path / "no.gguf")


def test_eight_bit_floats_with_block_scales(tmp_path: Path) -> None:
    """Each factor stands for 32 x 16 weights, those at the edges for fewer."""
    rng = np.random.default_rng(0)
    codes = (
        rng.integers(0, 0x7F, (80, 40)).astype(np.uint8)
        | rng.integers(0, 2, (80, 40)).astype(np.uint8) << 7
    )
    scales = rng.uniform(0.5, 2, (3, 3)).astype(np.float32)
    header, data = {}, b""
    for name, kind, x in (("w.weight", "F8_E4M3", codes), ("w.weight_scale_inv", "F32", scales)):
        raw = x.tobytes()
        header[name] = {
            "dtype": kind,
            "shape": x.shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    head = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 16]}}
    tensors = read_folder(tmp_path, config)
    assert list(tensors) == ["w.weight"]
    expected = (
        as_float32("F8_E4M3", codes) * np.kron(scales, np.ones((32, 16), np.float32))[:80, :40]
    )
    assert (tensors["w.weight"].read() == expected).all()
    assert (tensors["w.weight"].rows(30, 50) == expected[30:50]).all()
    assert as_float32("F8_E4M3", np.array([0x38, 0x7E, 0x01, 0xB8], np.uint8)).tolist() == [
        1, 448, 2.0**-9, -1,
    ]  # fmt: skip
    assert as_float32("F8_E5M2", np.array([0x3C, 0xC0], np.uint8)).tolist() == [1, -2]
    config = {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(ArgumentError, match="quantised by 'gptq'"):
        read_folder(tmp_path, config)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding is read in a few runs of rows."""
    from tinyllm.gguf import quantize
    from tinyllm.gguf.convert import safetensors

    monkeypatch.setattr(quantize, "_CHUNK", 64 * 16)
    sizes = []
    rows = safetensors.StoredTensor.rows

    def watched(self: Any, start: int, stop: int) -> Any:
        sizes.append((self.name, stop - start))
        return rows(self, start, stop)

    monkeypatch.setattr(safetensors.StoredTensor, "rows", watched)
    tinyllm.convert(folder_of("qwen2", tmp_path), tmp_path / "out.gguf")
    assert max(n for name, n in sizes if "embed_tokens" in name) == 16


# ---- what is refused


def test_a_folder_without_a_vocabulary_converts_with_a_warning(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match="has no vocabulary"):
        tinyllm.convert(folder, tmp_path / "out.gguf", "F32")
    with tinyllm.load(tmp_path / "out.gguf") as model:
        assert model.logits(IDS).shape == (len(IDS), 352)


def test_the_files_of_older_tokenizers(tmp_path: Path) -> None:
    folder = folder_of("gpt2", tmp_path)
    tinyllm.convert(folder, tmp_path / "new.gguf")
    old = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(old["model"]["vocab"]))
    merges = "\n".join(" ".join(m) for m in old["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges + "\n", "utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(t["id"]): t for t in old["added_tokens"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    tinyllm.convert(folder, tmp_path / "old.gguf")
    keys = [described(tmp_path / n)[0] for n in ("new.gguf", "old.gguf")]
    same = ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id")
    new, old_keys = ([k[f"tokenizer.ggml.{s}"] for s in same] for k in keys)
    assert new == old_keys


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"architectures": ["ParrotForCausalLM"]}, UnsupportedModel, "'ParrotForCausalLM' is none"),
        ({"num_hidden_layers": None}, ArgumentError, "config.json lacks"),
        ({"rope_scaling": {"rope_type": "dynamic"}, "rope_parameters": None}, ArgumentError, "'dynamic'"),
        ({"vocab_size": None}, ArgumentError, "config.json lacks vocab_size"),
        ({"num_attention_heads": 5}, ArgumentError, "does not fit config.json's heads"),
        ({"num_hidden_layers": 10**9}, ArgumentError, "says 1000000000 layers; the files have 20 tensors"),
        ({"architectures": 7}, UnsupportedModel, "architecture 7 is none"),
        ({"rope_parameters": [1]}, ArgumentError, r"rope_parameters = \[1\]; expected an object"),
        ({"text_config": 3}, ArgumentError, "text_config = 3; expected an object"),
        ({"num_attention_heads": "four"}, ArgumentError, "num_attention_heads = 'four'"),
        ({"num_hidden_layers": 1}, ArgumentError, "says 1 layers; the files have one of number [12]"),
        ({"num_hidden_layers": 3}, GGUFError, r"blk\.2\..* is missing; config.json says 3 layers"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_not_understood(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    folder = folder_of("llama", tmp_path)
    config = MODELS["llama"]["config"] | change
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    with pytest.raises(error, match=message):
        tinyllm.convert(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("name", ["global_head_dim", "partial_rotary_factor"])
def test_what_gemma_4_says_of_layers_that_see_everything_is_not_guessed(
    name: str, tmp_path: Path
) -> None:
    folder = folder_of("gemma4", tmp_path)
    config = json.loads(json.dumps(MODELS["gemma4"]["config"]))
    config.pop("per_layer_config")  # which may say the size of heads instead
    if name == "partial_rotary_factor":
        config["global_head_dim"] = 32
        del config["rope_parameters"]["full_attention"][name]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArgumentError, match=f"config.json lacks {name}"):
        tinyllm.convert(folder, tmp_path / "out.gguf")


def test_tensors_without_a_place_and_missing_experts_are_told(tmp_path: Path) -> None:
    folder = folder_of("mixtral", tmp_path)
    shapes = dict(MODELS["mixtral"]["shapes"])
    expert = next(n for n in shapes if ".experts.1." in n)
    write_safetensors(
        folder / "model.safetensors", {n: s for n, s in shapes.items() if n != expert}
    )
    with pytest.raises(GGUFError, match="is missing for expert 1"):
        tinyllm.convert(folder, tmp_path / "out.gguf")
    more = shapes | {"model.layers.0.self_attn.parrot": ("F32", [4])}
    write_safetensors(folder / "model.safetensors", more)
    with pytest.raises(UnsupportedModel, match=r"llama has no place for the tensors .*parrot"):
        tinyllm.convert(folder, tmp_path / "out.gguf")


def test_a_number_that_is_none_is_told_whatever_the_type(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(raw)
    with pytest.raises(NumericError, match="holds NaN or infinity"):
        tinyllm.convert(folder, tmp_path / "out.gguf", "F32")


def test_no_file_of_the_folder_is_overwritten(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    (tmp_path / "weights").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    before = {p: p.read_bytes() for p in folder.iterdir()}
    for name in ("model.safetensors", "config.json", "../weights"):
        with pytest.raises(ArgumentError, match="is a file of the source"):
            tinyllm.convert(folder, folder / name)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    for _ in range(2):  # what was made of it may be made again
        tinyllm.convert(folder, folder / "model.gguf")


LAST = "model.layers.1.mlp.down_proj.weight"
WHOLE = {LAST: "model.safetensors"}


@pytest.mark.parametrize(
    ("shapes", "files", "message"),
    [
        ({LAST: None}, {}, r"blk\.1\.ffn_down\.weight: is missing"),
        ({"model.embed_tokens.weight": None}, {}, r"token_embd\.weight: no stored tensor becomes it"),
        ({LAST: ("I8", [64, 96])}, {}, "is of type I8, which holds no weights"),
        ({}, {"model.safetensors.index.json": "{"}, "is damaged; expected JSON with the file of each"),
        ({}, {"model.safetensors.index.json": {"weight_map": [1]}}, "is damaged; expected JSON"),
        ({LAST: None}, {"model.safetensors.index.json": {"weight_map": WHOLE}}, "says that it is there"),
        ({}, {"tokenizer.json": {"version": "1.0"}}, "tokenizer.json has no model"),
        ({}, {"tokenizer.json": {"model": {}}}, "the vocabulary's files are damaged"),
        ({}, {"modules.json": "{"}, "modules.json is damaged"),
        ({}, {"modules.json": [1]}, "modules.json is damaged"),
    ],
)  # fmt: skip
def test_what_a_folder_lacks_is_told(
    shapes: dict[str, Any], files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = folder_of("llama", tmp_path)
    stored = {n: s for n, s in (MODELS["llama"]["shapes"] | shapes).items() if s}
    write_safetensors(folder / "model.safetensors", stored)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    with pytest.raises((ArgumentError, GGUFError), match=message):
        tinyllm.convert(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_parts_without_an_index_are_all_there_or_refused(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(
        GGUFError, match=r"one of 2 parts; model-00002-of-00002\.safetensors is missing"
    ):
        tinyllm.convert(folder, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "takes 0 bytes"),
        (b"\xff" * 16, "header takes"),
        ((7).to_bytes(8, "little") + b"{broken", "no JSON"),
        (lambda head: head.replace(b'"F32"', b'"Q77"'), "type 'Q77'"),
        (lambda head: head.replace(b"[0, 16]", b"[0, 20]"), "takes 16 bytes"),
        (lambda head: head.replace(b"[0, 16]", b"[9, 25]"), "takes 16 bytes"),
        (lambda head: head.replace(b'"F32"', b"[]"), "the header says"),
        (lambda head: head.replace(b"[4]", b'"4"'), "the header says"),
        (lambda head: head.replace(b"[4]", b"[true]"), "the header says"),
        (lambda head: head.replace(b"[4]", b"[0, %d]" % (1 << 61)), "the header says"),
        (lambda head: head.replace(b"[4]", b"[%s]" % b",".join([b"1"] * 99)), "the header says"),
        (lambda head: b"[" * 100_000, "no JSON"),
    ],
)
def test_damaged_files(data: Any, message: str, tmp_path: Path) -> None:
    if callable(data):
        head = data(b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}')
        data = len(head).to_bytes(8, "little") + head + bytes(16)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(GGUFError, match=message):
        read_folder(tmp_path, {})


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ArgumentError, match=r"pytorch_model.bin is pickled"):
        read_folder(tmp_path, {})
    with pytest.raises(ArgumentError, match=r"has no config.json"):
        tinyllm.convert(tmp_path, tmp_path / "out.gguf")


# ---- pre-tokenizers

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = [
    r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]  # fmt: skip


def split(*expressions: str) -> dict[str, Any]:
    steps = [
        {"type": "Split", "pattern": {"Regex": e}, "behavior": "Isolated", "invert": False}
        for e in expressions
    ]
    return {"type": "Sequence", "pretokenizers": [*steps, LEVEL]}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
PROGRAMS = [
    (BYTES, False, "gpt-2"),
    ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}, False,
     "starcoder"),
    (split(QWEN2), False, "qwen2"),
    (split(LLAMA3), True, "llama-bpe"),
    (split(LLAMA3), False, "dbrx"),
    (split(TEKKEN), True, "tekken"),
    (split(GPT4O), False, "gpt-4o"),
    (split(*DEEPSEEK3), False, "deepseek-v3"),
    ({"type": "Sequence", "pretokenizers": [
        {"type": "Punctuation", "behavior": "Contiguous"}, BYTES,
        {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
    ]}, False, "falcon"),
    ({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r" ?[^(\s|[.,!?…。，、।۔،])]+"}, "behavior": "Isolated",
         "invert": False}, LEVEL,
    ]}, False, "bloom"),
]  # fmt: skip


@pytest.mark.parametrize(("program", "ignore_merges", "name"), PROGRAMS, ids=lambda p: str(p)[:20])
def test_a_pre_tokenizer_is_known_by_what_it_does(
    program: Any, ignore_merges: bool, name: str
) -> None:
    tokenizer = {"pre_tokenizer": program, "model": {"ignore_merges": ignore_merges}}
    assert recognise(tokenizer, (name,)) == name


def test_names_are_preferred_only_where_they_do_the_same() -> None:
    tokenizer = {"pre_tokenizer": BYTES, "model": {}}
    assert recognise(tokenizer, ("qwen2", "olmo")) == "olmo"
    nfc = {"pre_tokenizer": split(QWEN2), "model": {}, "normalizer": {"type": "NFC"}}
    assert recognise(nfc) == "qwen2"  # the one that composes, too


@pytest.mark.parametrize(
    ("program", "found"),
    [
        (split(r"\p{L}{1,5}|."), r"\\p{L}{1,5}|."),
        ({"type": "Parrot"}, "type 'Parrot'"),
        (BYTES, "ignore_merges=True"),
    ],
)
def test_an_unknown_pre_tokenizer_is_refused_with_what_was_found(program: Any, found: str) -> None:
    with pytest.raises(UnsupportedModel) as error:
        recognise({"pre_tokenizer": program, "model": {"ignore_merges": True}})
    assert found in str(error.value)


def test_an_added_token_without_a_row_is_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = folder_of("qwen2", tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    tokenizer["added_tokens"].append({"id": 999, "content": "<far>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.warns(UserWarning, match="'<far>', are left out: the embedding has 352 rows"):
        tinyllm.convert(folder, tmp_path / "out.gguf")


def test_a_sentencepiece_model_in_tokenizer_json_merges_as_itself(tmp_path: Path) -> None:
    """Scores follow the merges' ranks; llama.cpp's converter gives all tokens one score."""
    folder = folder_of("mistral", tmp_path)
    tinyllm.convert(folder, tmp_path / "pieces.gguf")
    with gguf.open(tmp_path / "pieces.gguf") as file:
        one = tokenizers.load(file.metadata)
        tokens = file.metadata["tokenizer.ggml.tokens"].tolist()[:340]
        scores = file.metadata["tokenizer.ggml.scores"]
    ids = {t: i for i, t in enumerate(tokens)}
    merges = [
        (scores[i], [t[:n], t[n:]])
        for i, t in enumerate(tokens)
        for n in range(1, len(t))
        if i >= 259 and t[:n] in ids and t[n:] in ids
    ]
    merges.sort(key=lambda m: -m[0])
    tokenizer = {
        "model": {"type": "BPE", "vocab": ids, "merges": [m for _, m in merges], "byte_fallback": True,
                  "unk_token": "<unk>"},
        "normalizer": {"type": "Prepend", "prepend": "▁"},
        "added_tokens": [{"id": ids[t], "content": t, "special": True} for t in ("<s>", "</s>")],
    }  # fmt: skip
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    tinyllm.convert(folder, tmp_path / "json.gguf")
    with gguf.open(tmp_path / "json.gguf") as file:
        two = tokenizers.load(file.metadata)
    texts = [t for t in TEXTS if "<" not in t]
    assert [two.encode(t) for t in texts] == [one.encode(t) for t in texts]


def test_what_a_file_cannot_hold_of_a_tokenizer_is_told(tmp_path: Path) -> None:
    folder = folder_of("qwen2", tmp_path)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    steps = [{"type": "NFC"}, {"type": "Lowercase"}, {"type": "Strip"}]
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}
    single = [{"SpecialToken": {"id": t, "type_id": 0}} for t in ("<s>", "<l>")]
    single.append({"Sequence": {"id": "A", "type_id": 0}})
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": []}
    path.write_text(json.dumps(tokenizer))
    with (
        pytest.warns(UserWarning, match="changes texts by Lowercase, Strip before it splits"),
        pytest.warns(UserWarning, match="puts <l> beside a text, too"),
    ):
        tinyllm.convert(folder, tmp_path / "out.gguf")


def test_nothing_warns_of_a_good_folder(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tinyllm.convert(folder_of("bert", tmp_path), tmp_path / "out.gguf")
