"""Well-formed GGUF files that are no usable models: keys, tensors and vocabularies that contradict each other.

`cases` yields (name, bytes, fragment of the expected message), like those of ``malformed``. Names begin with
``model/``, ``vocabulary/`` or ``template/``. `VALID` are the models that the cases start from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from malformed import Case, written

import tinyllm
from tinyllm import gguf
from tinyllm.chat import render as chat

E, F, H, K, LAYERS = 32, 64, 4, 2, 2  # n_embd, n_ff, n_head, n_head_kv
D = E // H
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{i:02X}>" for i in range(256)),
    "▁",
    *"abcdefgh",
    "ab",
    "▁a",
    "▁ab",
]
TYPES = np.array([2, 3, 3, *[6] * 256, *[1] * 12], np.int32)
V = len(PIECES)
NAN, INF = float("nan"), float("inf")

HPARAMS = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.context_length": 64,
    "llama.embedding_length": E,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": H,
    "llama.attention.head_count_kv": K,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": D,
    "llama.rope.freq_base": 10000.0,
}
SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": -np.arange(V, dtype=np.float32),
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}
ALPHABET = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 324))]  # GPT-2's bytes
BPE_PIECES = ["<s>", "</s>", *ALPHABET, "ab", "Ġa", "Ġab"]
BPE_PIECES += [f"<unused{i}>" for i in range(V - len(BPE_PIECES))]
BPE = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": BPE_PIECES,
    "tokenizer.ggml.token_type": np.array([3, 3, *[1] * (V - 2)], np.int32),
    "tokenizer.ggml.merges": ["a b", "Ġ a", "Ġa b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}
UNIGRAM = {**SPM, "tokenizer.ggml.model": "t5"}
WPM_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"▁{c}" for c in "abcdefgh"), *"abcdefgh"]
WPM = {
    "tokenizer.ggml.model": "bert",
    "tokenizer.ggml.tokens": WPM_PIECES + [f"[unused{i}]" for i in range(V - len(WPM_PIECES))],
    "tokenizer.ggml.token_type": np.array([3, 2, 3, 3, *[1] * (V - 4)], np.int32),
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 3,
    "tokenizer.ggml.unknown_token_id": 1,
    "tokenizer.ggml.seperator_token_id": 3,
    "tokenizer.ggml.padding_token_id": 0,
}


def weight(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    return (0.1 * rng.standard_normal(shape)).astype(np.float32)


def layer(i: int) -> dict[str, Any]:
    shapes = {
        "attn_norm": (E,),
        "attn_q": (E, E),
        "attn_k": (K * D, E),
        "attn_v": (K * D, E),
        "attn_output": (E, E),
        "ffn_norm": (E,),
        "ffn_gate": (F, E),
        "ffn_up": (F, E),
        "ffn_down": (E, F),
    }
    return {f"blk.{i}.{name}.weight": weight(*shape) for name, shape in shapes.items()}


DENSE = {
    "token_embd.weight": weight(V, E),
    "output_norm.weight": np.ones(E, np.float32),
    "output.weight": weight(V, E),
    **layer(0),
    **layer(1),
}
EXPERTS = {"llama.expert_count": 2, "llama.expert_used_count": 1}
MIXTURE = {name: t for name, t in DENSE.items() if ".ffn_" not in name or "ffn_norm" in name}
for _i in range(LAYERS):
    MIXTURE[f"blk.{_i}.ffn_gate_inp.weight"] = weight(2, E)
    MIXTURE[f"blk.{_i}.ffn_gate_exps.weight"] = weight(2, F, E)
    MIXTURE[f"blk.{_i}.ffn_up_exps.weight"] = weight(2, F, E)
    MIXTURE[f"blk.{_i}.ffn_down_exps.weight"] = weight(2, E, F)
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def model(
    changes: dict[str, Any] | None = None,
    vocabulary: dict[str, Any] = SPM,
    tensors: dict[str, Any] = DENSE,
) -> bytes:
    """A model file; a change to None removes the key, and one whose name is a tensor's changes that."""
    metadata, weights = {**HPARAMS, **vocabulary}, dict(tensors)
    for name, value in (changes or {}).items():
        where = weights if name.endswith((".weight", ".bias")) else metadata
        if value is None:
            del where[name]
        else:
            where[name] = value
    return written(metadata, weights)


VALID = {
    "spm": model(),
    "bpe": model(vocabulary=BPE),
    "unigram": model(vocabulary=UNIGRAM),
    "wpm": model(vocabulary=WPM),
    "experts": model(EXPERTS, tensors=MIXTURE),
    "tied": model({"output.weight": None}),
    "template": model({"tokenizer.chat_template": TEMPLATE}),
}


def short(value: Any) -> str:
    text = "missing" if value is None else str(value).replace("\n", " ")
    return text if len(text) < 30 else f"{text[:20]}..."


def key_cases() -> Iterator[Case]:
    """One wrong value of one architecture key each."""
    wrong: dict[str, list[Any]] = {
        "block_count": [None, 0, 1, 3, 513, 2**32 - 1, -1, 2.0, "2", True, [2, 2]],
        "context_length": [None, 0, -1, 2**63, 64.0, "64"],
        "embedding_length": [None, 0, 16, 33, 64, 2**31, -32, 32.0],
        "feed_forward_length": [63, 128, -64, [64], [64, 64, 64], [64, 32], 2**40],
        "attention.head_count": [None, 0, 3, 8, 64, 2**20, -4, 4.0, [4], [4, 4, 4], [4, 0]],
        "attention.head_count_kv": [0, 3, 4, 8, -2, [2], [2, 2, 2], [2, 0]],
        "attention.key_length": [0, 7, 16, 2**20, -8],
        "attention.value_length": [0, 16, 2**20],
        "attention.layer_norm_rms_epsilon": [None, 0.0, -1e-5, "1e-5", True],
        "attention.sliding_window": [-1, 2**40, 8.0],
        "attention.scale": ["x", True],
        "attention.causal": [1, "no"],
        "rope.dimension_count": [7, 16, 2**31, -8, 8.0],
        "rope.freq_base": [0.0, -1.0, "10000"],
        "rope.scaling.type": ["nonsense", 1],
        "rope.scaling.factor": [0.0, -2.0, "2"],
        "expert_count": [4, 10**6, -1],
        "vocab_size": [5, V + 1, "x"],
        "pooling_type": [9, -1, "mean"],
        "logits_are_halved": [True],
        "rope.nonsense": [1.0],
    }
    for key, values in wrong.items():
        for value in values:
            yield f"model/{key}={short(value)}", model({f"llama.{key}": value}), ""
    for value in ("nonsense", "clip"):
        yield f"model/architecture={value}", model({"general.architecture": value}), value
    yield (
        "model/architecture=missing",
        model({"general.architecture": None}),
        "general.architecture",
    )
    for name, value in (
        ("expert_used_count", 0),
        ("expert_used_count", 3),
        ("expert_count", 3),
        ("expert_count", 0),
        ("expert_used_count", None),
        ("expert_gating_func", 77),
    ):
        changes = {**EXPERTS, f"llama.{name}": value}
        changes = {k: v for k, v in changes.items() if v is not None}
        yield f"model/experts {name}={short(value)}", model(changes, tensors=MIXTURE), ""
    yield "model/kind=vocabulary", written({**HPARAMS, **SPM}, {}), ""
    yield "model/kind=empty", written({}, {}), "general.architecture"


def tensor_cases() -> Iterator[Case]:
    """One missing, misshapen, misplaced or senseless tensor each."""
    for name in (
        "token_embd",
        "output_norm",
        "blk.0.attn_q",
        "blk.1.attn_norm",
        "blk.1.ffn_up",
        "blk.0.ffn_down",
    ):
        yield f"model/without {name}", model({f"{name}.weight": None}), name
    shapes = {
        "token_embd.weight": [(E, V), (V, E // 2), (V - 1, E), (V,), (1, V, E)],
        "output.weight": [(E, V), (V + 1, E), (V - 1, E)],
        "output_norm.weight": [(E // 2,), (1,), (E, E)],
        "blk.0.attn_norm.weight": [(E + 1,), (1, E)],
        "blk.0.attn_q.weight": [(E, 2 * E), (E // 2, E), (E,), (2, E, E)],
        "blk.0.attn_k.weight": [(E, E), (E, K * D)],
        "blk.0.attn_v.weight": [(E, E), (K * D, 2 * E)],
        "blk.0.attn_output.weight": [(2 * E, E)],
        "blk.0.ffn_up.weight": [(E, F), (F + 32, E)],
        "blk.1.ffn_down.weight": [(F, E), (E, F + 32)],
        "blk.0.attn_q.bias": [(E + 1,), (E, E)],
        "rope_freqs.weight": [(D,), (1,)],
    }
    for name, wrong in shapes.items():
        for shape in wrong:
            yield f"model/{name} {shape}", model({name: weight(*shape)}), ""
    for name in (
        "blk.0.nonsense.weight",
        "blk.2.attn_q.weight",
        "blk.x.attn_q.weight",
        "extra.weight",
        "blk.-1.attn_q.weight",
        "blk.1000000000.attn_q.weight",
    ):
        yield f"model/extra {name}", model({name: weight(E, E)}), name.partition("0.")[2]
    for shape in ((F,), (2 * F, E), (1, 2, F, E)):
        name = "blk.0.ffn_up_exps.weight"
        changes = {**EXPERTS, name: weight(*shape)}
        yield f"model/experts {name} {shape}", model(changes, tensors=MIXTURE), name
    for dtype in (np.int8, np.int16, np.int32, np.int64):
        for name in ("token_embd.weight", "blk.0.ffn_up.weight", "output_norm.weight"):
            shape = DENSE[name].shape
            yield f"model/{name} {dtype.__name__}", model({name: np.ones(shape, dtype)}), name


def number_cases() -> Iterator[Case]:
    """NaN and infinity in weights: found at load or when logits come out."""
    for value in (NAN, INF, -INF):
        for name in ("output_norm.weight", "blk.0.attn_q.weight", "output.weight"):
            spoilt = DENSE[name].copy()
            spoilt[...] = value
            yield f"model/{name} all {value}", model({name: spoilt}), ""
        blocks = np.zeros((V, 18), np.uint8)
        blocks[:, :2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
        raw = gguf.RawTensor("Q4_0", (V, E), blocks)
        yield f"model/output.weight Q4_0 scale {value}", model({"output.weight": raw}), ""
        one = DENSE["output.weight"].copy()
        one[5, 5] = value
        yield f"model/output.weight one {value}", model({"output.weight": one}), ""


def vocabulary_cases() -> Iterator[Case]:
    t = "tokenizer.ggml."
    spoilt: dict[str, list[Any]] = {
        "model": [None, "nonsense", 1, ["llama"]],
        "tokens": [
            None,
            7,
            True,
            0.5,
            "abc",
            np.arange(V, dtype=np.int32),
            PIECES[:-1],
            [*PIECES, "more"],
            ["<unk>"],
        ],
        "scores": [np.zeros(V - 1, np.float32), np.full(V, NAN, np.float32), ["0"] * V, 1.0],
        "token_type": [
            TYPES[:-1],
            np.full(V, 99, np.int32),
            np.full(V, -1, np.int32),
            ["1"] * V,
            1,
        ],
        "bos_token_id": [V, 2**32 - 1, -1, "1", 1.0, True],
        "eos_token_id": [V, 2**32 - 1, -1, "2"],
        "unknown_token_id": [V, -1],
        "padding_token_id": [V, -1],
        "eot_token_id": [V, 2**31],
        "add_bos_token": [1, "yes"],
        "add_space_prefix": ["yes"],
    }
    for key, values in spoilt.items():
        for value in values:
            label = short(
                value if isinstance(value, (str, int, float)) or value is None else list(value)
            )
            named = "" if key == "model" else t  # without that key there is no vocabulary to blame
            yield f"vocabulary/{key}={label}", model({t + key: value}), named
    empty = gguf.StringArray.of([])
    yield "vocabulary/tokens=none", model({t + "tokens": empty}), t + "tokens"
    for n in (V - 1, V + 1):
        fewer = {"token_embd.weight": weight(n, E), "output.weight": weight(n, E)}
        yield f"vocabulary/{V} tokens for {n} rows", model(fewer), "token"
    for i, token, why in (
        (262, "a", "twice"),
        (5, "<0x-1>", "byte"),
        (5, "<0xGG>", "byte"),
        (5, "<0x100>", "byte"),
        (5, "", "byte"),
        (5, "<0x03>", "twice"),
        (265, "x" * 1_000_000, "megabyte"),
    ):
        tokens = [*PIECES[:i], token, *PIECES[i + 1 :]]
        yield (
            f"vocabulary/token {short(token)!r} {why}",
            model({t + "tokens": tokens}),
            t + "tokens",
        )
    yield from bpe_cases(t)
    yield from unigram_cases(t)


def bpe_cases(t: str) -> Iterator[Case]:
    merges: list[Any] = [
        *(
            ["ab"],
            [""],
            ["a  b"],
            ["a b c"],
            [" "],
            ["a "],
            ["x" * 9 + " " + "y" * 9],
            ["zz b"],
            "a b",
        ),
        *(np.arange(3, dtype=np.int32), [b"\xff \xfe"], ["a b"] * 2),
    ]
    for value in merges:
        label = short(value if isinstance(value, str) else list(value))
        yield f"vocabulary/merges={label}", model({t + "merges": value}, BPE), t + "merges"
    yield "vocabulary/merges=missing", model({t + "merges": None}, BPE), t + "merges"
    for value in ("nonsense", 1, ["gpt-2"]):
        yield f"vocabulary/pre={short(value)}", model({t + "pre": value}, BPE), "pre"


def unigram_cases(t: str) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    charsmaps = {
        "1 byte": b"\0",
        "3 bytes": b"\1\0\0",
        "length beyond": b"\xff\xff\xff\x7f" + bytes(8),
        "odd length": b"\5\0\0\0" + bytes(9),
        "random": bytes(rng.integers(0, 256, 4096, dtype=np.uint8)),
        "random trie": (1024).to_bytes(4, "little")
        + bytes(rng.integers(0, 256, 2048, dtype=np.uint8)),
        "offset beyond": (8).to_bytes(4, "little") + b"\xff\xff\xff\xff" * 2 + b"a\0",
    }
    for name, raw in charsmaps.items():
        value = np.frombuffer(raw, np.uint8)
        yield (
            f"vocabulary/charsmap {name}",
            model({t + "precompiled_charsmap": value}, UNIGRAM),
            t + "precompiled_charsmap",
        )
    yield (
        "vocabulary/charsmap=text",
        model({t + "precompiled_charsmap": "abc"}, UNIGRAM),
        t + "precompiled_charsmap",
    )
    infinite = np.full(V, INF, np.float32)
    yield "vocabulary/scores=inf", model({t + "scores": infinite}, UNIGRAM), t + "scores"


GROWING = "{{% for i in range(40) %}}{{% set ns.{0} = ns.{0} + ns.{0} %}}{{% endfor %}}"


def template_cases() -> Iterator[Case]:
    templates = {
        "syntax": "{% for m in messages %}",
        "three loops": "{% for i in range(9999) %}" * 3 + "x" + "{% endfor %}" * 3,
        "huge range": "{% for i in range(10**9) %}{% endfor %}",
        "huge text": "{{ 'a' * 10**9 }}",
        "huge number": "{{ 10**(10**9) }}",
        "format": '{{ "%1000000000d" % 1 }}',
        "doubling": f"{{% set ns = namespace(s='a') %}}{GROWING.format('s')}{{{{ ns.s }}}}",
        "join": f"{{% set ns = namespace(s=['a']) %}}{GROWING.format('s')}{{{{ ns.s | join }}}}",
        "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "class": "{{ ''.__class__.__mro__ }}",
        "attr": "{{ ('{0.__class__}' | attr('format'))(1) }}",
        "context": "{{ self._TemplateReference__context }}",
        "cycler": "{{ cycler.__init__.__globals__ }}",
        "lipsum": "{{ lipsum.__globals__ }}",
        "include": "{% include '/etc/passwd' %}",
        "import": "{% import 'os' as os %}",
        "raise": "{{ raise_exception('no such role') }}",
        "undefined": "{{ messages[0].nothing.at_all }}",
    }
    for name, text in templates.items():
        yield f"template/{name}", model({"tokenizer.chat_template": text}), ""
    for value in (1, ["a"]):
        yield f"template/{short(value)}", model({"tokenizer.chat_template": value}), "chat_template"


GROUPS: tuple[Callable[[], Iterator[Case]], ...] = (
    *(key_cases, tensor_cases, number_cases, vocabulary_cases, template_cases),
)


def cases() -> Iterator[Case]:
    """Every file that is no usable model: (name, bytes, fragment of the message)."""
    seen: Counter[str] = Counter()
    for group in GROUPS:
        for name, raw, message in group():
            seen[name] += 1
            yield name if seen[name] == 1 else f"{name} ({seen[name]})", raw, message


def use(path: str) -> None:
    """What a user does with a model; one of these steps must refuse it."""
    with tinyllm.load(path, device="reference", n_ctx=32) as loaded:
        loaded.generate("ab a", max_tokens=3, temperature=0)
        template = chat.pick_template(loaded.metadata)
    if template is not None:
        chat.render(template, [{"role": "user", "content": "hi"}], bos_token="<s>")
