"""The LLaMA network in torch; its parameters carry GGUF's tensor names, so export renames nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Config:
    n_vocab: int
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_ctx: int
    rope_freq_base: float
    norm_eps: float
    dropout: float
    tied: bool = True  # whether the head is the embedding table

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def rope_angles(config: Config) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n_ctx, head_dim / 2] of position times frequency."""
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = torch.outer(torch.arange(config.n_ctx), config.rope_freq_base**-exponents)
    return angles.cos(), angles.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of [B, T, H, D]: the pairing of GGUF's `llama` architecture."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[: x.shape[1], None], sin[: x.shape[1], None]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, T, D] from [B, K, T, D]; on a CPU in bfloat16 faster than torch's fused attention."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    later = torch.full(scores.shape[-2:], float("-inf"), dtype=q.dtype).triu(1)
    return (scores + later).softmax(-1) @ v


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        n_embd, n_kv = config.n_embd, config.n_head_kv * config.head_dim
        self.head_dim = config.head_dim
        self.attn_norm = nn.RMSNorm(n_embd, eps=config.norm_eps)
        self.attn_q = nn.Linear(n_embd, n_embd, bias=False)
        self.attn_k = nn.Linear(n_embd, n_kv, bias=False)
        self.attn_v = nn.Linear(n_embd, n_kv, bias=False)
        self.attn_output = nn.Linear(n_embd, n_embd, bias=False)
        self.ffn_norm = nn.RMSNorm(n_embd, eps=config.norm_eps)
        self.ffn_gate = nn.Linear(n_embd, config.n_ff, bias=False)
        self.ffn_up = nn.Linear(n_embd, config.n_ff, bias=False)
        self.ffn_down = nn.Linear(config.n_ff, n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attn_norm(x), cos, sin))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim))
            for linear in (self.attn_q, self.attn_k, self.attn_v)
        )
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.attn_output(causal_attention(q, k, v).transpose(1, 2).flatten(-2))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn_down(F.silu(self.ffn_gate(x)) * self.ffn_up(x))


class Llama(nn.Module):
    """Ids [B, T] to logits [B, T, V]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.token_embd = nn.Embedding(config.n_vocab, config.n_embd)
        self.blk = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.output_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        if not config.tied:
            self.output = nn.Linear(config.n_embd, config.n_vocab, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        cos, sin = rope_angles(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Normal(0, 0.02); what is added to the residual starts smaller, by the number of additions."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                depth = (2 * self.config.n_layer) ** 0.5
                output = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(parameter, std=0.02 / depth if output else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        head = self.token_embd if self.config.tied else self.output
        return F.linear(self.output_norm(self.residual(ids)), head.weight)

    def residual(self, ids: Tensor) -> Tensor:
        """What the last block leaves, [B, T, E]."""
        x = self.dropout(self.token_embd(ids))
        for block in self.blk:
            x = block(x, self.cos, self.sin)
        return x

    def loss(self, ids: Tensor) -> Tensor:
        """Mean nats per id of predicting ids[:, 1:]."""
        logits = self(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
