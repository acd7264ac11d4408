"""Nothing of a file is ignored: each tensor and each key is needed, and nothing else may be there.

Generated over the golden files. A network is built on a backend that outlines weights instead of reading them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from packed import PACKED, unpacked

from tinyllm import gguf
from tinyllm.cli.info import Outlines
from tinyllm.errors import DeviceError, TinyLLMError, UnsupportedModel
from tinyllm.models.archs import ARCHS, NOT_RUN, find
from tinyllm.models.build import build
from tinyllm.models.keys import HARMLESS
from tinyllm.models.weights import MAY_BE_ABSENT

OURS = Path(__file__).parent.parent / "data" / "models"


class Sketch(Outlines):
    """Loads nothing at all."""

    def array(self, x: Any) -> Any:
        return x


def path_of(name: str, data: Path) -> Path:
    return unpacked(name) if name in PACKED else data / "golden" / "models" / f"{name}.gguf"


def golden(data: Path) -> list[Path]:
    files = [*(data / "golden" / "models").glob("*.gguf"), *OURS.glob("*.gguf")]
    files += map(unpacked, PACKED)
    assert len(files) >= 73
    return sorted(files)


@contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """A file's metadata and tensors (unread), and the prefix of its keys."""
    with gguf.open(path) as f:
        yield dict(f.metadata), dict(f.tensors), f"{f.metadata['general.architecture']}."


def refusal(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """Why the file is refused; empty if it is not."""
    try:
        build(metadata, tensors, Sketch(), "f32")
    except TinyLLMError as e:
        return str(e)
    return ""


def worth_dropping(tensors: Mapping[str, Any], n_layer: int) -> Iterator[str]:
    """All tensors but those of the layers in the middle, which are like others."""
    for name in tensors:
        layer = re.match(r"(?:enc\.|dec\.)?blk\.(\d+)\.", name)
        if layer is None or int(layer[1]) in (0, 1, n_layer - 1):
            yield name


def test_no_tensor_may_be_missing(data: Path) -> None:
    unexplained, seen = [], set()
    for path in golden(data):
        with opened(path) as (metadata, tensors, prefix):
            assert refusal(metadata, tensors) == "", path.stem
            for name in worth_dropping(tensors, metadata[f"{prefix}block_count"]):
                said = refusal(metadata, {k: v for k, v in tensors.items() if k != name})
                if not said and name in MAY_BE_ABSENT:
                    seen.add(name)
                elif name not in said:
                    unexplained.append((path.stem, name, said))
    assert unexplained == []
    assert seen == set(MAY_BE_ABSENT)


@pytest.mark.parametrize(
    "name",
    ["nonsense.weight", "blk.0.nonsense.weight", "blk.99.attn_norm.weight", "blk.x.a.weight"],
)
def test_no_tensor_may_be_added(name: str, data: Path) -> None:
    for path in golden(data):
        with opened(path) as (metadata, tensors, _):
            more = tensors | {name: tensors["token_embd.weight"]}
            assert name in refusal(metadata, more), path.stem


def test_no_key_may_be_misspelt(data: Path) -> None:
    for path in golden(data):
        with opened(path) as (metadata, tensors, prefix):
            for key in [k for k in metadata if k.startswith(prefix)]:
                renamed = {(f"{k}_" if k == key else k): v for k, v in metadata.items()}
                assert key in refusal(renamed, tensors), (path.stem, key)


def test_what_is_not_understood_may_be_overlooked_on_request(data: Path) -> None:
    with opened(data / "golden" / "models" / "llama-mha.gguf") as (metadata, tensors, _):
        metadata["llama.nonsense"] = 1
        with pytest.raises(UnsupportedModel, match=r"llama\.nonsense"):
            build(metadata, tensors, Sketch())
        with pytest.warns(UserWarning, match=r"llama\.nonsense"):
            build(metadata, tensors, Sketch(), strict=False)


def test_the_written_lists_are_short_and_give_reasons() -> None:
    assert len(MAY_BE_ABSENT) <= 10
    assert all(len(reason) > 20 for reason in MAY_BE_ABSENT.values())
    assert len(HARMLESS) <= 40


@pytest.mark.parametrize(
    ("file", "key", "value", "named"),
    [
        ("llama-mha", "block_count", 0, "llama.block_count"),
        ("llama-mha", "block_count", 513, "llama.block_count"),
        ("llama-mha", "block_count", 1, "blk.1."),
        ("llama-mha", "block_count", 3, "blk.2."),
        ("llama-mha", "embedding_length", 128, "token_embd.weight"),
        ("llama-mha", "attention.head_count", 0, "llama.attention.head_count"),
        ("llama-mha", "attention.head_count", 7, "llama.attention.head_count"),
        ("llama-mha", "attention.head_count_kv", 3, "llama.attention.head_count_kv"),
        ("llama-mha", "attention.head_count", [4, 4, 4], "llama.attention.head_count"),
        ("llama-mistral", "attention.key_length", 0, "llama.attention.key_length"),
        ("llama-mistral", "attention.key_length", 23, "llama.rope.dimension_count"),
        ("llama-mha", "rope.dimension_count", 18, "llama.rope.dimension_count"),
        ("llama-mha", "rope.dimension_count", 7, "llama.rope.dimension_count"),
        ("llama-mha", "rope.dimension_count", 0, "llama.rope.dimension_count"),
        ("llama-mha", "rope.freq_base", 1.0, "llama.rope.freq_base"),
        ("llama-mha", "context_length", 0, "llama.context_length"),
        ("llama-mha", "context_length", 1 << 63, "llama.context_length"),
        ("llama-mixtral", "expert_count", 1_000_000, "llama.expert_count"),
        ("llama-mixtral", "expert_used_count", 5, "llama.expert_used_count"),
        ("llama-mixtral", "expert_used_count", 0, "llama.expert_used_count"),
        ("deepseek2-v3", "expert_gating_func", 77, "deepseek2.expert_gating_func"),
        ("deepseek2-v3", "expert_group_count", 3, "deepseek2.expert_group_count"),
        ("gemma2", "attention.sliding_window", -1, "gemma2.attention.sliding_window"),
        ("gemma2", "attn_logit_softcapping", -50.0, "gemma2.attn_logit_softcapping"),
        ("granite", "logit_scale", 0.0, "granite.logit_scale"),
        ("llama-mha", "attention.layer_norm_rms_epsilon", 0.0, "layer_norm_rms_epsilon"),
        ("llama-mha", "attention.layer_norm_rms_epsilon", -1e-5, "layer_norm_rms_epsilon"),
        ("llama-mha", "attention.layer_norm_rms_epsilon", float("nan"), "layer_norm_rms_epsilon"),
        ("llama-mha", "vocab_size", 511, "llama.vocab_size"),
        ("jais", "attention.head_count", 0, "jais.attention.head_count"),
        ("rwkv7", "wkv.head_size", 0, "rwkv7.wkv.head_size"),
        ("rwkv6", "wkv.head_size", 7, "rwkv6.wkv.head_size"),
        ("mamba", "ssm.conv_kernel", 0, "ssm_conv1d"),
        ("mamba", "ssm.state_size", 0, "ssm_"),
        ("openelm", "attention.head_count", [4], "openelm.attention.head_count"),
        ("openelm", "feed_forward_length", [128, 190], "blk.1.ffn_"),
    ],
)
def test_senseless_sizes_are_refused(
    file: str, key: str, value: Any, named: str, data: Path
) -> None:
    with opened(data / "golden" / "models" / f"{file}.gguf") as (metadata, tensors, prefix):
        assert named in refusal({**metadata, prefix + key: value}, tensors)


def test_an_output_matrix_may_not_be_missing_where_the_row_says_so(data: Path) -> None:
    with opened(data / "golden" / "models" / "gptneox.gguf") as (metadata, tensors, _):
        assert "output.weight" in find("gptneox").needs
        del tensors["output.weight"]
        assert refusal(metadata, tensors).startswith("output.weight: tensor is missing")


@pytest.mark.parametrize("name", ["deepseek32", "glm-dsa", "dots3note", "deepseek", "mistral4"])
def test_a_head_that_is_the_embedding_is_taken(name: str) -> None:
    with opened(unpacked(name)) as (metadata, tensors, _):
        assert refusal(metadata, {n: t for n, t in tensors.items() if n != "output.weight"}) == ""


@pytest.mark.parametrize(
    ("name", "key"), [("step35", "swiglu_clamp_exp"), ("gemma3n", "activation_sparsity_scale")]
)
@pytest.mark.parametrize("value", ["abc", ["a", "b"], [[1.0], [1.0, 2.0]], True, [1.0] * 99])
def test_what_is_no_number_for_each_layer_is_refused(
    name: str, key: str, value: Any, data: Path
) -> None:
    with opened(path_of(name, data)) as (metadata, tensors, prefix):
        said = refusal({**metadata, prefix + key: value}, tensors)
    assert said.startswith(f"{prefix}{key}: is ")


@pytest.mark.parametrize("name", ["mimo2", "step35", "plamo3", "modern-bert"])
def test_layers_with_a_window_rotate_plainly_where_the_file_says_nothing_else(
    name: str, data: Path
) -> None:
    with opened(path_of(name, data)) as (metadata, tensors, prefix):
        base = {k: v for k, v in metadata.items() if k != f"{prefix}rope.freq_base_swa"}
        scaled = {f"{prefix}rope.scaling.type": "linear", f"{prefix}rope.scaling.factor": 4.0}
        c = build({**base, **scaled}, tensors, Sketch(), "f32").config
    assert (c.rope_freq_base_swa, c.rope_scaling_swa) == (10000.0, False)


def test_a_base_that_layers_with_a_window_need_is_asked_for() -> None:
    with opened(unpacked("dots3note")) as (metadata, tensors, prefix):
        del metadata[f"{prefix}rope.freq_base_swa"]
        assert refusal(metadata, tensors).startswith(f"{prefix}rope.freq_base_swa: required key")


def test_layers_with_a_window_have_sinks_all_or_none_and_so_have_the_others() -> None:
    first, second, third = (f"blk.{i}.attn_sinks.weight" for i in range(3))

    def sinks(tensors: dict[str, Any]) -> list[bool]:
        blocks = build(metadata, tensors, Sketch(), "f32").decoder.blocks
        return [b.mixer.sinks is not None for b in blocks]

    with opened(unpacked("mimo2")) as (metadata, tensors, _):
        full = tensors | {first: tensors[second], third: tensors[second]}
        assert sinks(tensors) == [False, True, False, True]
        assert sinks(full) == [True] * 4
        assert sinks({n: t for n, t in tensors.items() if "sinks" not in n}) == [False] * 4
        assert third in refusal(metadata, {n: t for n, t in full.items() if n != third})


WINDOWS = [  # a golden file, its key for the pattern, and each layer's window; llama.cpp b11434 reads them so
    ("gemma3", None, [8, 8, 8, 8, 8, 0]),
    ("gemma3", 2, [8, 0] * 3),
    ("gemma3", 1, [0] * 6),
    ("gemma3", 0, [8] * 6),
    ("gemma3", [False, True] * 3, [0, 8] * 3),
    ("gemma3", [True] * 6, [8] * 6),
    ("modern-bert", None, [0, 8, 8, 0]),
    ("modern-bert", 2, [0, 8, 0, 8]),
    ("cohere2", 2, [8, 0, 8, 0]),
    ("gemma2", [True, False, False], [8, 0, 0]),
]


@pytest.mark.parametrize(("file", "pattern", "windows"), WINDOWS)
def test_which_layers_have_a_window(
    file: str, pattern: Any, windows: list[int], data: Path
) -> None:
    with opened(data / "golden" / "models" / f"{file}.gguf") as (metadata, tensors, prefix):
        key = f"{prefix}attention.sliding_window_pattern"
        metadata.pop(key, None)
        if pattern is not None:
            metadata[key] = pattern
        net = build(metadata, tensors, Sketch(), "f32")
    assert list(net.config.window) == windows


def test_gemma_2s_windows_are_of_4096_where_only_the_layers_are_named(data: Path) -> None:
    with opened(data / "golden" / "models" / "gemma2.gguf") as (metadata, tensors, prefix):
        del metadata[f"{prefix}attention.sliding_window"]
        metadata[f"{prefix}attention.sliding_window_pattern"] = [False, True, True]
        assert build(metadata, tensors, Sketch(), "f32").config.window == (0, 4096, 4096)


def test_layers_of_llama_4_with_chunks_are_those_that_the_file_names() -> None:
    with opened(unpacked("llama4")) as (metadata, tensors, prefix):
        metadata[f"{prefix}attention.sliding_window_pattern"] = [True, False, False, True]
        c = build(metadata, tensors, Sketch(), "f32").config
    assert c.window == (-8192, 0, 0, -8192)
    assert c.rope_on == (True, True, True, False) == tuple(not h for h in c.heated)


@pytest.mark.parametrize(
    ("file", "size", "pattern", "turned"),
    [
        ("cohere2", 8, [False] * 4, [False] * 4),
        ("cohere2", 8, [True] * 4, [True] * 4),
        ("cohere2", 0, None, [True, True, True, False]),
        ("cohere2", None, None, None),
        ("exaone4-swa", 8, [False] * 64, [False] * 64),
        ("exaone4-swa", 0, None, [True] * 64),
        ("exaone4-swa", None, [False] * 64, [True] * 64),
    ],
)
def test_layers_that_see_everything_do_not_turn(
    file: str, size: int | None, pattern: Any, turned: list[bool] | None, data: Path
) -> None:
    """Cohere's never do; EXAONE's do in models without any window."""
    with opened(data / "golden" / "models" / f"{file}.gguf") as (metadata, tensors, prefix):
        given = {"attention.sliding_window": size, "attention.sliding_window_pattern": pattern}
        for key, value in given.items():
            metadata.pop(prefix + key, None)
            if value is not None:
                metadata[prefix + key] = value
        if turned is None:
            assert refusal(metadata, tensors).endswith("sliding_window: required key is missing")
        else:
            assert list(build(metadata, tensors, Sketch(), "f32").config.rope_on) == turned


def test_a_number_says_which_layers_have_a_window_only_where_a_row_reads_it() -> None:
    with opened(unpacked("granite_swa")) as (metadata, tensors, prefix):
        metadata[f"{prefix}attention.sliding_window_pattern"] = 2
        said = refusal(metadata, tensors)
    assert said.endswith(
        "sliding_window_pattern: is 2; expected for each layer whether it has a window"
    )


def test_the_file_names_the_activation(data: Path) -> None:
    with opened(data / "golden" / "models" / "modern-bert.gguf") as (metadata, tensors, prefix):
        metadata[f"{prefix}hidden_activation"] = "silu"
        assert build(metadata, tensors, Sketch(), "f32").decoder.blocks[0].ffn.act == "silu"
        metadata[f"{prefix}hidden_activation"] = "nonsense"
        assert "hidden_activation is 'nonsense'" in refusal(metadata, tensors)


def test_a_vocabulary_has_as_many_tokens_as_the_embedding_has_rows(data: Path) -> None:
    with opened(data / "golden" / "models" / "llama-mha.gguf") as (metadata, tensors, _):
        metadata["tokenizer.ggml.tokens"] = list(metadata["tokenizer.ggml.tokens"])[:-1]
        assert refusal(metadata, tensors).startswith("tokenizer.ggml.tokens: counts 511 tokens")


def test_architectures_are_named_in_the_table_only() -> None:
    spelt = re.compile("|".join(rf"[\"']{re.escape(name)}[\"']" for name in ARCHS))
    for path in Path(build.__code__.co_filename).parent.glob("*.py"):
        if path.name != "archs.py":
            assert not spelt.search(path.read_text("utf-8")), path.name


@pytest.mark.parametrize("name", ["clef", "wavtokenizer-dec", "dream", "nonsense"])
def test_architectures_that_are_not_run_are_named(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"'{name}' is not supported") as e:
        find(name)
    assert "; we run: afmoe, apertus, arcee" in str(e.value)
    assert NOT_RUN.get(name, "") in str(e.value)


# What llama.cpp b11434 names.
LLAMA_CPP = """afmoe apertus arcee arctic arwkv7 baichuan bailingmoe bailingmoe2 bailingmoe3 bert bitnet bloom
chameleon chatglm clef clip codeshell cogvlm cohere2 cohere2moe command-r dbrx deci deepseek deepseek2
deepseek2-ocr deepseek32 deepseek4 dflash dots1 dots3note dream eagle3 ernie4_5 ernie4_5-moe eurobert exaone
exaone-moe exaone4 falcon falcon-h1 gemma gemma-embedding gemma2 gemma3 gemma3n gemma4 gemma4-assistant glm-dsa
glm4 glm4moe glm5-next gpt-oss gpt2 gptj gptneox granite granite_swa granitehybrid granitemoe graniteswitch grok
grovemoe hrm_text hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 hy_v4 internlm2 jais jais2 jamba jina-bert-v2
jina-bert-v3 kimi-k3 kimi-linear laguna lfm2 lfm2moe llada llada-moe llama llama-embed llama4 maincoder mamba
mamba2 maple mellum mimo2 minicpm minicpm3 minimax-01 minimax-m2 minimax-m3 mistral3 mistral4 modern-bert mpt
muse-glimmer nanbeige nemotron nemotron_h nemotron_h_moe neo-bert nomic-bert nomic-bert-moe olmo olmo2 olmoe
openelm orion paddleocr pangu-embedded phi2 phi3 phimoe plamo plamo2 plamo3 plm pockettts qwen qwen2 qwen2moe
qwen2vl qwen3 qwen35 qwen35moe qwen3moe qwen3next qwen3tts qwen3vl qwen3vlmoe qwen4exp refact rnd1 rwkv6
rwkv6qwen2 rwkv7 seed_oss smallthinker smollm3 spark2_5 stablelm starcoder starcoder2 step35 t5 t5encoder talkie
wavtokenizer-dec xverse""".split()


def test_every_name_is_run_or_refused_with_its_reason() -> None:
    assert not set(ARCHS) & set(NOT_RUN)
    assert set(ARCHS) | set(NOT_RUN) == set(LLAMA_CPP)


def test_sparse_attention_is_refused_where_it_would_not_be_plain() -> None:
    with opened(unpacked("deepseek32")) as (metadata, tensors, _):
        net = build(metadata | {"deepseek32.attention.indexer.top_k": 64}, tensors, Sketch(), "f32")
    assert net.config.n_ctx_train == 64
    with pytest.raises(DeviceError, match="runs up to n_ctx=64"):
        net.new_state(65)


def test_budgets_hold() -> None:
    folder = Path(build.__code__.co_filename).parent
    text = (folder / "decoder.py").read_text()
    assert len(text.splitlines()) <= 250
    call = text[text.index("    def __call__") : text.index("    def feed")]
    assert len(call.strip().splitlines()) <= 30
