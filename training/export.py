"""Write a checkpoint as GGUF: python export.py --run DIR [--checkpoint best.pt] --out FILE."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import BEGIN, END, SPECIAL
from network import Config
from train import load_config

import tinyllm.gguf
from tinyllm.gguf.quants import quantize

HERE = Path(__file__).parent
NORMAL, CONTROL = 1, 3  # tokenizer.ggml.token_type
MOSTLY_Q8_0 = 7  # general.file_type

GENERAL = {
    "general.architecture": "llama",
    "general.type": "model",
    "general.name": "tinyllm tales",
    "general.description": "A small model of simple stories and of dialogues with an assistant",
    "general.license": "cc-by-sa-4.0",
    "general.tags": ["text-generation"],
    "general.languages": ["en"],
    "general.datasets": [
        "TinyStories (CDLA-Sharing-1.0)",
        "Schema-Guided Dialogue (CC-BY-SA-4.0)",
        "Household Tales by the Brothers Grimm (public domain)",
    ],
    "general.file_type": MOSTLY_Q8_0,
    "general.quantization_version": 2,
}


def shape_metadata(config: Config) -> dict[str, Any]:
    return {
        "llama.vocab_size": config.n_vocab,
        "llama.context_length": config.n_ctx,
        "llama.embedding_length": config.n_embd,
        "llama.block_count": config.n_layer,
        "llama.feed_forward_length": config.n_ff,
        "llama.attention.head_count": config.n_head,
        "llama.attention.head_count_kv": config.n_head_kv,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_freq_base,
    }


def vocabulary_metadata(tokenizer: Path) -> dict[str, Any]:
    """Tokens, merges and the control tokens' roles, from the file that `tokenizers` saved."""
    bpe = json.loads(tokenizer.read_text("utf-8"))["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    kinds = [CONTROL if token in SPECIAL else NORMAL for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in bpe["merges"]],
        "tokenizer.ggml.bos_token_id": bpe["vocab"][BEGIN],
        "tokenizer.ggml.eos_token_id": bpe["vocab"][END],
        "tokenizer.ggml.eot_token_id": bpe["vocab"][END],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": (HERE / "chat_template.jinja").read_text("utf-8").strip(),
    }


def stored(weight: torch.Tensor) -> np.ndarray | tinyllm.gguf.RawTensor:
    """Matrices as Q8_0, norms as F32."""
    values = weight.numpy()
    if values.ndim == 1:
        return values
    return tinyllm.gguf.RawTensor("Q8_0", values.shape, quantize("Q8_0", values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the folder that train.py wrote")
    parser.add_argument("--checkpoint", default="best.pt")
    parser.add_argument("--out", type=Path, default=HERE.parent / "tinyllm/data/bundled.gguf")
    args = parser.parse_args()
    config = load_config(json.loads((HERE / "settings.json").read_text()))
    weights = torch.load(args.run / args.checkpoint, map_location="cpu", weights_only=True)
    n_parameters = sum(weight.numel() for weight in weights.values())
    metadata = {
        **GENERAL,
        "general.parameter_count": n_parameters,
        **shape_metadata(config),
        **vocabulary_metadata(args.run / "tokenizer.json"),
    }
    tensors = {name: stored(weight) for name, weight in weights.items()}
    tinyllm.gguf.write(args.out, metadata, tensors)
    print(f"{n_parameters:,} parameters, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
