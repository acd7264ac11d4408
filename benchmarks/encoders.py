"""The engines that embeddings.py asks, each in a process of its own: python encoders.py NAME.

All get the same texts and give one vector of length 1 each, tokenisation included.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np

clock = time.perf_counter
BATCH = 32  # texts at a time, for engines that do not choose themselves
PARTS = {  # names in a layer of the file: in torch's BERT
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
EMBEDDINGS = {"token_embd": "word", "position_embd": "position", "token_types": "token_type"}


class Encoder:
    """What embeddings.py may ask."""

    def load(self, model: str, threads: int) -> str:
        """Load a file; returns the engine's name with its version."""
        raise NotImplementedError

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> [n, n_embd]."""
        raise NotImplementedError

    def measure(self, texts: Sequence[str]) -> float:
        """Seconds of one call."""
        start = clock()
        self.embed(texts)
        return clock() - start

    def vectors(self, texts: Sequence[str], path: str) -> None:
        """Write the embeddings to an .npy file."""
        np.save(path, np.asarray(self.embed(texts), np.float32))


class TinyLLM(Encoder):
    """This project."""

    compute: Any = "f32"

    def load(self, model: str, threads: int) -> str:
        import tinyllm

        self.model = tinyllm.load(model, n_threads=threads, compute=self.compute)
        return f"tinyllm {tinyllm.__version__}" + (" bf16" if self.compute == "bf16" else "")

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return self.model.embed(texts)

    def work(self, texts: Sequence[str]) -> dict[str, Any]:
        """Multiply-adds of all products of these texts, nothing padded; tokens."""
        c = self.model.config
        lengths = [len(self.model.tokenizer.encode(text)) for text in texts]
        weights = sum(4 * c.n_embd**2 + 2 * c.n_embd * n_ff for n_ff in c.n_ff)
        macs = sum(n * weights + 2 * n * n * c.n_embd * c.n_layer for n in lengths)
        return {"texts": len(texts), "tokens": sum(lengths), "gflop": 2 * macs / 1e9}


class Rounded(TinyLLM):
    """tinyllm with products of bfloat16, where the processor has them."""

    compute = "bf16"


class GPT4All(Encoder):
    """GPT4All's Embed4All."""

    def load(self, model: str, threads: int) -> str:
        from importlib.metadata import version

        from gpt4all import Embed4All

        path = Path(model).resolve()
        self.model = Embed4All(
            path.name, model_path=path.parent, allow_download=False, n_threads=threads, device="cpu"
        )
        return f"gpt4all {version('gpt4all')}"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.array(self.model.embed(list(texts), prefix=""))


class Torch(Encoder):
    """torch in float32 as a careful user writes it: sorted by length, little padded, fused attention."""

    def load(self, model: str, threads: int) -> str:
        import torch
        from tokenizers import BertWordPieceTokenizer

        from tinyllm import gguf

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        with gguf.open(model) as file:
            self.model = bert(file)
            words = enumerate(file.metadata["tokenizer.ggml.tokens"])
            self.tokenizer = BertWordPieceTokenizer({plain(w): i for i, w in words}, lowercase=True)
        return f"torch {torch.__version__} float32"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        ids = [torch.tensor(e.ids) for e in self.tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out: list[Any] = [None] * len(ids)
        for i in range(0, len(order), BATCH):
            part = order[i : i + BATCH]
            for j, x in zip(part, self.forward([ids[j] for j in part]), strict=True):
                out[j] = x
        return torch.stack(out).numpy()

    def forward(self, ids: list[Any]) -> Any:
        """Means over each text's tokens, of length 1."""
        import torch

        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([len(i) for i in ids])[:, None]
        x = self.model(padded, attention_mask=mask.long()).last_hidden_state
        x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(x, dim=-1)


def plain(word: str) -> str:
    """A word of the file as the original vocabulary has it: there continuations are marked, not beginnings."""
    if word.startswith("[") and word.endswith("]"):
        return word
    return word[1:] if word.startswith("\u2581") else "##" + word


def bert(file: Any) -> Any:
    """The file's model in transformers, its weights in float32."""
    import torch
    from transformers import BertConfig, BertModel

    meta, tensors = file.metadata, file.tensors
    config = BertConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=meta["bert.embedding_length"],
        num_hidden_layers=meta["bert.block_count"],
        num_attention_heads=meta["bert.attention.head_count"],
        intermediate_size=meta["bert.feed_forward_length"],
        max_position_embeddings=tensors["position_embd.weight"].shape[0],
        type_vocab_size=tensors["token_types.weight"].shape[0],
        layer_norm_eps=meta["bert.attention.layer_norm_epsilon"],
        attn_implementation="sdpa",
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    weights = {torch_name(n): torch.from_numpy(t.dequantize().copy()) for n, t in tensors.items()}
    missing = model.load_state_dict(weights, strict=False)
    if missing.unexpected_keys or any("position_ids" not in k for k in missing.missing_keys):
        raise RuntimeError(f"the file's tensors do not fit torch's model: {missing}")
    return model


def torch_name(name: str) -> str:
    """blk.0.attn_q.weight -> encoder.layer.0.attention.self.query.weight"""
    first, *rest = name.split(".")
    if first == "blk":
        return f"encoder.layer.{rest[0]}.{PARTS[rest[1]]}.{rest[2]}"
    if first == "token_embd_norm":
        return f"embeddings.LayerNorm.{rest[0]}"
    return f"embeddings.{EMBEDDINGS[first]}_embeddings.{rest[0]}"


class Peak:
    """The machine's float32 arithmetic, on registers alone."""

    def gflops(self, threads: int, seconds: float) -> float:
        """Float operations per second / 1e9: two for each multiply-add."""
        from tinyllm.kernels.cpu.limits import float_peak

        return float_peak(threads, seconds) / 1e9


ENCODERS: dict[str, Any] = {
    "tinyllm": TinyLLM, "tinyllm-bf16": Rounded, "gpt4all": GPT4All, "torch": Torch, "peak": Peak,
}  # fmt: skip

if __name__ == "__main__":
    common.serve(ENCODERS[sys.argv[1]]())
