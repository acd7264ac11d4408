"""Adapters give what PEFT computes with them, each row its own, and the same bits in any batch."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinyllm
from tinyllm import gguf
from tinyllm.errors import ArgumentError, GGUFError, StateError, UnsupportedModel
from tinyllm.gguf.adapter import read_adapter

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path.insert(0, str(DATA))
from make_adapters import STORED, write_adapter  # noqa: E402
from make_convert import IDS, write_safetensors  # noqa: E402

ADAPTERS = json.loads(gzip.decompress((DATA / "adapters.json.gz").read_bytes()))
LLAMAS = [name for name in ADAPTERS if name.startswith("llama")]
EXACT = 1e-4  # x std, where all is float32


def saved(name: str, top: Path, **config: Any) -> Path:
    """The folder that PEFT saved."""
    stored = ADAPTERS[name]
    write_adapter(top / name, stored["config"] | config, stored["shapes"])
    return top / name


def base(name: str, top: Path, kind: str = "F32") -> Path:
    """A model of the conversions' tests."""
    model, folder, out = STORED["models"][name], top / f"{name}-folder", top / f"{name}-{kind}.gguf"
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(model["config"]))
        for file, text in STORED["vocabularies"][model["vocabulary"]].items():
            (folder / file).write_bytes(text.encode("latin-1"))
        write_safetensors(folder / "model.safetensors", model["shapes"])
    tinyllm.convert(folder, out, kind)
    return out


def as_gguf(folder: Path, model: Path, out: Path, **keys: Any) -> Path:
    """A PEFT adapter as llama.cpp's converter of adapters writes it: alpha apart from the factors."""
    with gguf.open(model) as file:
        metadata, shapes = dict(file.metadata), {n: t.shape for n, t in file.tensors.items()}
    tensors = {}
    for name, (down, up) in read_adapter(folder, metadata, shapes).pairs.items():
        tensors[f"{name}.lora_a"] = down
        tensors[f"{name}.lora_b"] = up * np.float32(up.shape[1] / 8)
    head = {
        "general.type": "adapter", "general.architecture": metadata["general.architecture"],
        "adapter.type": "lora", "adapter.lora.alpha": np.float32(8), **keys,
    }  # fmt: skip
    gguf.write(out, head, tensors)
    return out


@pytest.mark.parametrize("device", ["reference", "cpu", "opencl:0"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_what_peft_computes(name: str, device: str, tmp_path: Path) -> None:
    model, expected = base(ADAPTERS[name]["base"], tmp_path), np.array(ADAPTERS[name]["logits"])
    with tinyllm.load(model, device, kv_type="f32", lora=saved(name, tmp_path)) as m:
        bound = (EXACT if device == "reference" else 1e-3) * expected.std()
        assert np.abs(m.logits(IDS)[-1, :32] - expected).max() < bound


def test_an_adapter_in_gguf_gives_what_its_folder_does(tmp_path: Path) -> None:
    model, folder = base("llama", tmp_path), saved("llama-some", tmp_path)
    file = as_gguf(folder, model, tmp_path / "some.gguf")
    with tinyllm.load(model, "reference", lora=[folder, file]) as m:
        assert m.adapters == {"llama-some": 1.0, "some": 1.0}
        a, b = (m.logits(IDS, state=m.new_state(lora={n: 1.0})) for n in m.adapters)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * a.std())


def test_on_a_quantised_base_the_adapter_is_added_to_its_products(tmp_path: Path) -> None:
    base("llama", tmp_path)
    model, folder = base("llama", tmp_path, "Q8_0"), saved("llama-all", tmp_path)
    merged = tmp_path / "merged.gguf"
    with gguf.open(model) as file:  # exactly what the quantised weights stand for, in float32
        plain = {n: t.dequantize() for n, t in file.tensors.items()}
        gguf.write(tmp_path / "plain.gguf", dict(file.exact_metadata), plain)
    tinyllm.merge(tmp_path / "plain.gguf", merged, [folder])
    with tinyllm.load(merged, "reference", kv_type="f32") as m:
        expected = m.logits(IDS)
    with tinyllm.load(model, "reference", kv_type="f32", lora=[folder]) as m:
        assert np.abs(m.logits(IDS) - expected).max() < EXACT * expected.std()


def test_scales_and_several_adapters_add_up(tmp_path: Path) -> None:
    model = base("llama", tmp_path)
    pairs = [(saved("llama-all", tmp_path), 0.5), (saved("llama-ffn", tmp_path), -2)]
    tinyllm.merge(model, tmp_path / "merged.gguf", pairs)
    with tinyllm.load(tmp_path / "merged.gguf", "reference", kv_type="f32") as m:
        expected = m.logits(IDS)
    with tinyllm.load(model, "reference", kv_type="f32", lora=pairs) as m:
        assert m.adapters == {"llama-all": 0.5, "llama-ffn": -2.0}
        assert np.abs(m.logits(IDS) - expected).max() < EXACT * expected.std()


@pytest.mark.parametrize("device", ["cpu", "opencl:0"])
def test_eight_requests_with_four_adapters_in_one_step(device: str, tmp_path: Path) -> None:
    """On ``cpu`` each has the bits that it has alone, and those without adapters the bits of the base."""
    model = base("llama", tmp_path, "Q8_0")
    mixes: list[dict[str, float]] = [{n: 1.0} for n in LLAMAS]
    mixes += [{}, {LLAMAS[0]: 0.25}, {LLAMAS[1]: 1, LLAMAS[2]: -1}, {}]
    options = {"max_tokens": 12, "temperature": 0, "logprobs": 2}
    lora = [saved(n, tmp_path) for n in LLAMAS]
    prompts = [[i, *IDS[: 2 + i]] for i in range(8)]
    with tinyllm.load(model, device, lora=lora) as m:
        alone = [m.generate(p, lora=mix, **options) for p, mix in zip(prompts, mixes, strict=True)]
        with tinyllm.Engine(m) as engine:
            jobs = zip(prompts, mixes, strict=True)
            requests = [engine.submit(p, lora=mix, **options) for p, mix in jobs]
            together = [r.result() for r in requests]
            again = engine.submit(prompts[0], lora=mixes[1], **options).result()
        other = m.generate(prompts[0], lora=mixes[1], **options)
        assert other.ids != alone[0].ids
        for a, b in zip([*alone, other], [*together, again], strict=True):
            assert a.ids == b.ids
            if device == "cpu":
                assert a.logprobs == b.logprobs
    with tinyllm.load(model, device) as m:
        for i in (4, 7):
            assert m.generate(prompts[i], **options).logprobs == alone[i].logprobs


def test_bits_do_not_depend_on_threads_pieces_or_speculation(tmp_path: Path) -> None:
    model, lora = base("llama", tmp_path, "Q8_0"), saved("llama-all", tmp_path)
    found = []
    for n_threads in (1, 2):
        with tinyllm.load(model, n_threads=n_threads, lora=lora) as m:
            found.append(m.logits(IDS * 4))
            state = m.new_state()
            pieces = [m.logits(IDS, state=state) for _ in range(4)]
            found.append(np.concatenate(pieces))
            plain = m.generate(IDS * 4, max_tokens=24, temperature=0)
            guessed = m.generate(IDS * 4, max_tokens=24, temperature=0, speculate="lookup")
            assert plain.ids == guessed.ids
    assert all((x == found[0]).all() for x in found)


def test_a_state_keeps_its_scales(tmp_path: Path) -> None:
    model, lora = base("llama", tmp_path), saved("llama-all", tmp_path)
    with tinyllm.load(model, lora=lora) as m:
        on, off = m.new_state(), m.new_state(lora={})
        expected = m.logits(IDS, state=on)[-1]
        m.logits(IDS, state=off)
        fork = on.fork()
        fork.truncate(len(IDS) - 1)
        assert (m.logits(IDS[-1:], state=fork)[-1] == expected).all()
        on.save(tmp_path / "state.npz")
        with pytest.raises(StateError, match="another model"):
            m.new_state(lora={}).restore(tmp_path / "state.npz")
        m.new_state(lora={"llama-all": 1}).restore(tmp_path / "state.npz")
        with pytest.raises(ArgumentError, match="the state has other scales"):
            m.generate(IDS, state=off, lora={"llama-all": 1})
        with pytest.raises(ArgumentError, match="no adapter 'x'; this model has llama-all"):
            m.generate(IDS, lora={"x": 1})
        with pytest.raises(ArgumentError, match="expected a finite number"):
            m.generate(IDS, lora={"llama-all": float("nan")})


@pytest.mark.parametrize("key", ["ffn_gate_exps", "ffn_down_exps", "ffn_gate_inp", "attn_q"])
def test_experts_have_adapters_too(key: str, tmp_path: Path) -> None:
    model, rng = base("mixtral", tmp_path), np.random.default_rng(0)
    tensors = {}
    with gguf.open(model) as file:
        for name in [n for n in file.tensors if key in n]:
            *stack, n_out, n_in = file.tensors[name].shape
            tensors[f"{name}.lora_a"] = rng.normal(0, 0.3, (*stack, 3, n_in)).astype(np.float32)
            tensors[f"{name}.lora_b"] = rng.normal(0, 0.3, (*stack, n_out, 3)).astype(np.float32)
    head = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    lora = tmp_path / "lora.gguf"
    gguf.write(lora, head | {"adapter.lora.alpha": np.float32(6)}, tensors)
    tinyllm.merge(model, tmp_path / "merged.gguf", [lora])
    for device in ("reference", "cpu", "opencl:0"):
        with tinyllm.load(tmp_path / "merged.gguf", device, kv_type="f32") as m:
            expected = m.logits(IDS)
        with tinyllm.load(model, device, kv_type="f32", lora=[lora]) as m:
            found, plain = m.logits(IDS), m.logits(IDS, state=m.new_state(lora={}))
            assert np.abs(found - expected).max() < 1e-3 * expected.std()
            assert np.abs(plain - expected).max() > 0.05 * expected.std()


def test_a_folder_with_adapters_of_single_experts(tmp_path: Path) -> None:
    model = base("mixtral", tmp_path)
    module = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w1.lora_"
    shapes = {f"{module}A.weight": ("F32", [4, 64]), f"{module}B.weight": ("F32", [96, 4])}
    with gguf.open(model) as file:
        n, n_out, n_in = file.tensors["blk.1.ffn_gate_exps.weight"].shape
        shapes[f"{module}A.weight"][1][1], shapes[f"{module}B.weight"][1][0] = n_in, n_out
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
        write_adapter(tmp_path / "one", config, shapes)
        tensors = {name: t.shape for name, t in file.tensors.items()}
        pairs = read_adapter(tmp_path / "one", file.metadata, tensors).pairs
    (down, up) = pairs["blk.1.ffn_gate_exps.weight"]
    assert down.shape == (n, 4, n_in)
    assert [bool(up[i].any()) for i in range(n)] == [i == 2 for i in range(n)]


@pytest.mark.parametrize(
    ("config", "shapes", "message"),
    [
        ({"use_dora": True}, {}, "use_dora=True: DoRA scales each row"),
        ({"peft_type": "IA3"}, {}, "peft_type 'IA3'; expected 'LORA'"),
        ({}, {"base_model.model.model.norm.weight": ("F32", [64])}, "is no factor of a product"),
        ({}, {"base_model.model.model.layers.0.x.lora_A.weight": ("F32", [4, 64])}, "for model.layers.0.x"),
    ],
)  # fmt: skip
def test_what_is_no_product_is_refused(
    config: dict[str, Any], shapes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = base("llama", tmp_path)
    write_adapter(tmp_path / "a", {"peft_type": "LORA", **config}, shapes)
    with pytest.raises(UnsupportedModel, match=message):
        tinyllm.load(model, lora=tmp_path / "a")


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, other = base("llama", tmp_path), base("qwen2", tmp_path)
    folder = saved("llama-all", tmp_path)
    file = as_gguf(folder, model, tmp_path / "a.gguf")
    with pytest.raises(
        UnsupportedModel, match="the adapter is for 'llama', the model is a 'qwen2'"
    ):
        tinyllm.load(other, lora=file)
    with pytest.raises(ArgumentError, match="expected an adapter of type 'lora'"):
        tinyllm.load(model, lora=model)
    with pytest.raises(ArgumentError, match=r"expected adapter_config.json and adapter_model"):
        tinyllm.load(model, lora=tmp_path)
    with pytest.raises(ArgumentError, match="two adapters have one name"):
        tinyllm.load(model, lora=[folder, folder])
    with pytest.raises(ArgumentError, match="expected a list of files"):
        tinyllm.load(model, lora=3)  # type: ignore[arg-type]
    alora = {"adapter.alora.invocation_tokens": np.array([1], np.uint32)}
    late = as_gguf(folder, model, tmp_path / "b.gguf", **alora)
    with pytest.raises(UnsupportedModel, match="begin in the middle of a text"):
        tinyllm.load(model, lora=late)
    head = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    half = {"blk.0.attn_q.weight.lora_a": np.ones((2, 64), np.float32)}
    gguf.write(tmp_path / "c.gguf", head, half)
    with pytest.raises(GGUFError, match="only one factor of the adapter is there"):
        tinyllm.load(model, lora=tmp_path / "c.gguf")
    whole = {**half, "blk.0.attn_q.weight.lora_b": np.ones((65, 2), np.float32)}
    gguf.write(tmp_path / "d.gguf", head, whole)
    with pytest.raises(GGUFError, match=r"do not make the model's \(64, 64\)"):
        tinyllm.load(model, lora=tmp_path / "d.gguf")
    gguf.write(
        tmp_path / "e.gguf",
        head,
        {f"x.{n}": np.ones((2, 2), np.float32) for n in ("lora_a", "lora_b")},
    )
    with pytest.raises(GGUFError, match="the model has no such tensor"):
        tinyllm.load(model, lora=tmp_path / "e.gguf")


def test_the_commands_take_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tinyllm.cli import main

    model, folder = base("llama", tmp_path, "F16"), saved("llama-all", tmp_path)
    merged = tmp_path / "merged.gguf"
    assert main(["merge", str(model), str(merged), f"{folder}=0.5"]) == 0
    assert "MB" in capsys.readouterr().out
    texts = []
    for words in ([str(merged)], [str(model), "--lora", f"{folder}=0.5"]):
        assert main(["run", *words, "Once", "--temperature", "0", "--max-tokens", "4"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_head_that_shares_the_embedding_keeps_its_rows_in_a_merge(tmp_path: Path) -> None:
    model, folder = base("llama", tmp_path), saved("llama-some", tmp_path)
    types = tinyllm.merge(model, tmp_path / "merged.gguf", [folder])
    with gguf.open(model) as file:
        assert types.keys() - file.tensors.keys() == {"output.weight"}
    with tinyllm.load(model, "reference", kv_type="f32", lora=folder) as m:
        expected = m.logits(IDS)
    with tinyllm.load(tmp_path / "merged.gguf", "reference", kv_type="f32") as m:
        assert np.abs(m.logits(IDS) - expected).max() < EXACT * expected.std()


def test_an_adapter_of_a_head_that_shares_the_embedding_is_merged_as_it_is_loaded(
    tmp_path: Path,
) -> None:
    model, rng = base("llama", tmp_path), np.random.default_rng(0)
    with gguf.open(model) as file:
        assert "output.weight" not in file.tensors
        n_vocab, n_embd = file.tensors["token_embd.weight"].shape
        arch = file.metadata["general.architecture"]
    keys = {
        "general.type": "adapter", "general.architecture": arch, "adapter.type": "lora",
        "adapter.lora.alpha": np.float32(4),
    }  # fmt: skip
    factors = {"a": (2, n_embd), "b": (n_vocab, 2)}
    tensors = {
        f"output.weight.lora_{x}": rng.standard_normal(shape).astype(np.float32)
        for x, shape in factors.items()
    }
    gguf.write(tmp_path / "head.gguf", keys, tensors)
    tinyllm.merge(model, tmp_path / "merged.gguf", [(tmp_path / "head.gguf", 0.5)])
    found = []
    for path, lora in ((model, [(tmp_path / "head.gguf", 0.5)]), (tmp_path / "merged.gguf", ())):
        with tinyllm.load(path, "reference", kv_type="f32", lora=lora) as m:
            found.append(m.logits(IDS))
    with tinyllm.load(model, "reference", kv_type="f32") as m:
        assert np.abs(m.logits(IDS) - found[0]).max() > 0.1 * found[0].std()
    assert np.abs(found[0] - found[1]).max() < EXACT * found[0].std()


@pytest.mark.parametrize("name", ["llama-all", "llama-mlp"])
def test_heads_and_neurons_have_what_an_adapter_adds(name: str, tmp_path: Path) -> None:
    model, folder = base("llama", tmp_path), saved(name, tmp_path)
    tinyllm.merge(model, tmp_path / "merged.gguf", [folder])
    found = []
    for path, lora in ((model, folder), (tmp_path / "merged.gguf", ())):
        with tinyllm.load(path, "reference", kv_type="f32", lora=lora) as m:
            found.append([m.attribute(IDS, 5, by=by).values for by in ("heads", "neurons")])
            kept = m.run_with_cache(IDS, ["attn_result", "attn_out"])
            sums = kept["blk.0.attn_result"].sum(1)
            np.testing.assert_allclose(sums, kept["blk.0.attn_out"], atol=1e-5)
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("scale", [10**400, 1e300, float("nan"), True, "1"])
def test_scales_that_are_no_float32_are_refused(scale: Any, tmp_path: Path) -> None:
    with tinyllm.load(base("llama", tmp_path), lora=saved("llama-ffn", tmp_path)) as m:
        with pytest.raises(ArgumentError, match="finite"):
            m.generate(IDS, lora={"llama-ffn": scale})
    with pytest.raises(ArgumentError, match="finite"):
        tinyllm.merge(
            base("llama", tmp_path), tmp_path / "merged.gguf", [(tmp_path / "llama-ffn", scale)]
        )


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    file = as_gguf(saved("llama-ffn", tmp_path), base("llama", tmp_path), tmp_path / "a.gguf")
    with pytest.raises(GGUFError, match=r"general\.type: is 'adapter': an adapter for lora="):
        tinyllm.load(file)


@pytest.mark.parametrize(
    "config", ["{", "[]", {"lora_alpha": "x"}, {"alpha_pattern": {"(": 3}}, {"alpha_pattern": [1]}]
)
def test_a_configuration_that_is_damaged_is_refused(config: Any, tmp_path: Path) -> None:
    model = base("llama", tmp_path)
    changed = {} if isinstance(config, str) else config
    folder = saved("llama-ffn", tmp_path, **changed)
    if isinstance(config, str):
        (folder / "adapter_config.json").write_text(config)
    with pytest.raises(ArgumentError, match=r"adapter_config\.json"):
        tinyllm.load(model, lora=folder)


def test_scales_that_are_gone_leave_no_tree(tmp_path: Path) -> None:
    model, folder = base("llama", tmp_path), saved("llama-ffn", tmp_path)
    with tinyllm.load(model, lora=folder) as m, tinyllm.Engine(m) as e:
        for i in range(30):
            e.prefix_bytes = 4 * e._prefixes.nbytes if i == 1 else e.prefix_bytes
            e.submit(IDS, max_tokens=1, lora={"llama-ffn": i / 30}).result()
        assert 0 < len(e._prefixes._roots) < 20
