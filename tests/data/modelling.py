"""Models that transformers does not have, in NumPy and float64, written from their publishers' mathematics.

A model is its keys and its weights, as the GGUF file has them; ``forward`` is told what the file does not say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import recurrent

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Facts:
    """What distinguishes one architecture."""

    adjacent: bool = False  # rope turns values (2 i, 2 i + 1), not (i, i + D / 2)
    act: str = "silu"
    renormalise: bool = True
    sigmoid: bool = False
    norms_behind_rope: bool = False
    parallel: bool = False
    causal: bool = True
    rotates: str = "all"  # or "windowed": only layers with a window
    windows: tuple[int, ...] = ()
    routed_by_input: bool = False  # the router reads what goes into the block
    after: bool = False  # normalised behind each half, as BERT
    scale: float = 0.0  # scores are multiplied by it, or else by D^-1/2
    latent: bool = False
    last_norm: str = "output_norm"
    embedding: float = 1.0
    logits: float = 1.0
    softcap: float = 0.0
    post: tuple[str, str] = ("post_attention_norm", "post_ffw_norm")
    beside: float = 0.0  # a plain half beside experts, their sum times this


def rms(x: np.ndarray, w: np.ndarray | None, eps: float) -> np.ndarray:
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return y if w is None else y * w


def layer_norm(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float) -> np.ndarray:
    d = x - x.mean(-1, keepdims=True)
    return d / np.sqrt((d * d).mean(-1, keepdims=True) + eps) * w + b


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def erf(x: np.ndarray) -> np.ndarray:
    import math

    return np.vectorize(math.erf)(x)


ACTS = {
    "silu": lambda x: x * sigmoid(x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def rope(x: np.ndarray, n: int, base: float, adjacent: bool, first: int = 0) -> np.ndarray:
    """Turn n values of each head of x [T, H, D], from ``first`` on."""
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(0, n, 2) / n)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    y = x.copy()
    part = x[..., first : first + n]
    a, b = (
        (part[..., 0::2], part[..., 1::2])
        if adjacent
        else (part[..., : n // 2], part[..., n // 2 :])
    )
    turned = a * cos - b * sin, a * sin + b * cos
    out = np.stack(turned, -1).reshape(part.shape) if adjacent else np.concatenate(turned, -1)
    y[..., first : first + n] = out
    return y


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Model:
    """One model; ``forward`` gives logits, or rows where it has no head. All names are the file's."""

    def __init__(self, keys: dict[str, Any], w: Weights, f: Facts) -> None:
        self.k, self.f = keys, f
        self.w = {n: x.astype(np.float64) for n, x in w.items()}
        bare = [n for n in w if not n.endswith((".weight", ".bias"))]
        self.w |= {f"{n}.weight": self.w[n] for n in bare}
        self.first_values = np.zeros(0)  # RWKV 7's later layers read them
        self.eps = keys.get(
            "attention.layer_norm_rms_epsilon", keys.get("attention.layer_norm_epsilon")
        )

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        w = self.w[f"{name}.weight"]
        if "attention.layer_norm_epsilon" in self.k:
            return layer_norm(x, w, self.w[f"{name}.bias"], self.eps)
        return rms(x, w, self.eps)

    def per_layer(self, key: str, i: int) -> int:
        value = self.k[key]
        return value[i] if isinstance(value, list) else value

    def forward(self, ids: np.ndarray) -> np.ndarray:
        f, w = self.f, self.w
        x = w["token_embd.weight"][ids] * f.embedding
        if "token_types.weight" in w:
            x = x + w["token_types.weight"][0]
        if "token_embd_norm.weight" in w:
            x = self.norm("token_embd_norm", x)
        for run in range(self.k.get("num_loops", 1)):
            if run and not self.k["skip_loop_final_norm"]:
                x = self.norm(f.last_norm, x)
            for i in range(self.k["block_count"]):
                x = self.block(i, x)
        if f.after:
            return x
        x = self.norm(f.last_norm, x)
        if not f.causal:
            return x
        return x @ w.get("output.weight", w["token_embd.weight"]).T * f.logits

    def block(self, i: int, x: np.ndarray) -> np.ndarray:
        f, b = self.f, f"blk.{i}."
        start = x
        if f.after:
            x = self.norm(b + "attn_output_norm", x + self.attention(i, x))
            return self.norm(b + "layer_output_norm", x + self.plain(i, x))
        mixer = self.recurrent(b) or (
            self.attention if self.per_layer("attention.head_count", i) else None
        )
        y = np.zeros_like(x)
        h = self.norm(b + "attn_norm", x) if mixer else x
        if mixer:
            y = mixer(i, h)
        if f.parallel:
            return x + y + self.plain(i, h)
        if b + f.post[0] + ".weight" in self.w:
            y = self.norm(b + f.post[0], y)
        x = x + y
        if b + "ffn_norm.weight" not in self.w:
            return x
        h = self.norm(b + "ffn_norm", x)
        y = self.feed(i, h, start if f.routed_by_input else h)
        if b + f.post[1] + ".weight" in self.w:
            y = self.norm(b + f.post[1], y)
        return x + y

    def recurrent(self, b: str) -> Any:
        """The layer's recurrence, by its tensors; None without one."""
        kinds = {
            "ssm_in": recurrent.mamba_by_head,
            "time_mix_decay": recurrent.time_mix_6,
            "time_mix_k_k": recurrent.time_mix_7,
        }
        found = [run for name, run in kinds.items() if f"{b}{name}.weight" in self.w]
        return (lambda i, x: found[0](self, b, x)) if found else None

    # ---- attention

    def attention(self, i: int, x: np.ndarray) -> np.ndarray:
        k, f, b = self.k, self.f, f"blk.{i}."
        n, kv = (self.per_layer(f"attention.head_count{s}", i) for s in ("", "_kv"))
        if not kv:
            return self.linear(b + "attn_output", x)
        if f.latent:
            return self.latent(i, x)
        d, dv, t = k["attention.key_length"], k["attention.value_length"], len(x)
        if b + "attn_qkv.weight" in self.w:
            q, key, v = np.split(self.linear(b + "attn_qkv", x), [n * d, (n + kv) * d], -1)
        else:
            q, key, v = (self.linear(b + f"attn_{s}", x) for s in "qkv")
        q, key, v = q.reshape(t, n, d), key.reshape(t, kv, d), v.reshape(t, kv, dv)
        window = f.windows[i] if f.windows else 0
        base = k.get("rope.freq_base_swa", 0) if window else 0
        base = base or k.get("rope.freq_base", 10000.0)
        turn = k.get("rope.dimension_count", d) if f.rotates == "all" or window else 0

        def normed(z: np.ndarray, name: str) -> np.ndarray:
            return (
                rms(z, self.w[f"{b}{name}.weight"], self.eps)
                if f"{b}{name}.weight" in self.w
                else z
            )

        steps = [
            lambda z, name: normed(z, name),
            lambda z, name: rope(z, turn, base, f.adjacent) if turn else z,
        ]
        for step in reversed(steps) if f.norms_behind_rope else steps:
            q, key = step(q, "attn_q_norm"), step(key, "attn_k_norm")
        y = self.attend(q, key, v, f.scale or d**-0.5, window)
        if f"{b}attn_sub_norm.weight" in self.w:
            y = self.norm(b + "attn_sub_norm", y)
        return self.linear(b + "attn_output", y)

    def attend(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int
    ) -> np.ndarray:
        t, n = q.shape[:2]
        k, v = (np.repeat(z, n // z.shape[1], 1) for z in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) * scale
        if self.f.softcap:
            scores = self.f.softcap * np.tanh(scores / self.f.softcap)
        behind = np.arange(t)[:, None] - np.arange(t)
        hidden = (behind < 0) & self.f.causal
        if window:
            hidden = hidden | (behind >= window)
        probs = softmax(np.where(hidden, -np.inf, scores))
        return np.einsum("hts,shd->thd", probs, v).reshape(t, -1)

    def latent(self, i: int, x: np.ndarray) -> np.ndarray:
        """Keys and values from one short vector; the turned part of a key is all heads'."""
        k, b, t = self.k, f"blk.{i}.", len(x)
        n, r, p = k["attention.head_count"], k["attention.kv_lora_rank"], k["rope.dimension_count"]
        d, dv = k["attention.key_length"], k["attention.value_length"]
        q = self.linear(b + "attn_q", x).reshape(t, n, d)
        both = self.linear(b + "attn_kv_a_mqa", x)
        up = self.linear(b + "attn_kv_b", self.norm(b + "attn_kv_a_norm", both[:, :r]))
        up = up.reshape(t, n, d - p + dv)
        base = k.get("rope.freq_base", 10000.0)
        turned = rope(both[:, None, r:], p, base, self.f.adjacent)
        q = rope(q, p, base, self.f.adjacent, d - p)
        key = np.concatenate([up[..., : d - p], np.repeat(turned, n, 1)], -1)
        return self.linear(b + "attn_output", self.attend(q, key, up[..., d - p :], d**-0.5, 0))

    # ---- feeding forward

    def feed(self, i: int, x: np.ndarray, routed_by: np.ndarray) -> np.ndarray:
        b = f"blk.{i}."
        if b + "ffn_gate_inp.weight" not in self.w:
            return self.plain(i, x)
        y = self.experts(b, x, routed_by)
        if b + "ffn_up_shexp.weight" in self.w:
            y = y + self.plain(i, x, "_shexp")
        if self.f.beside and b + "ffn_up.weight" in self.w:
            y = (y + self.plain(i, x)) * self.f.beside
        return y

    def plain(self, i: int, x: np.ndarray, suffix: str = "") -> np.ndarray:
        b, act = f"blk.{i}.", ACTS[self.f.act]
        up, down = self.linear(f"{b}ffn_up{suffix}", x), f"{b}ffn_down{suffix}"
        n = self.w[f"{down}.weight"].shape[1]
        if f"{b}ffn_gate{suffix}.weight" in self.w:
            up = act(self.linear(f"{b}ffn_gate{suffix}", x)) * up
        elif up.shape[1] == 2 * n:
            up = act(up[:, :n]) * up[:, n:]
        else:
            up = act(up)
        if f"{b}ffn_sub_norm.weight" in self.w:
            up = self.norm(b + "ffn_sub_norm", up)
        return self.linear(down, up)

    def experts(self, b: str, x: np.ndarray, routed_by: np.ndarray) -> np.ndarray:
        """The chosen experts' outputs, weighed; neighbours may have a small expert in common."""
        k, f, w = self.k, self.f, self.w
        logits = routed_by @ w[b + "ffn_gate_inp.weight"].T
        scores = sigmoid(logits) if f.sigmoid else softmax(logits)
        choice = scores + w.get(b + "exp_probs_b.bias", 0)
        groups = k.get("expert_group_count", 1)
        if groups > 1:
            grouped = choice.reshape(len(x), groups, -1)
            best = np.sort(grouped, -1)[..., -2:].sum(-1)
            kept = np.argsort(-best, -1)[:, : k["expert_group_used_count"]]
            mask = np.full((len(x), groups, 1), -np.inf)
            np.put_along_axis(mask, kept[..., None], 0, 1)
            choice = (grouped + mask).reshape(len(x), -1)
        chosen = np.argsort(-choice, -1, kind="stable")[:, : k["expert_used_count"]]
        weights = np.take_along_axis(scores, chosen, -1)
        if k.get("expert_weights_norm", f.renormalise):
            weights = weights / weights.sum(-1, keepdims=True)
        weights = weights * k.get("expert_weights_scale", 1.0)
        sharing = k.get("experts_per_group", 0)
        kinds = [("exps", chosen, 1.0)]
        kinds += [("chexps", chosen // sharing, k["expert_group_scale"])] if sharing else []
        y = np.zeros_like(x)
        for suffix, which, scale in kinds:
            gate, up, down = (w[f"{b}ffn_{n}_{suffix}.weight"] for n in ("gate", "up", "down"))
            for t, row in enumerate(x):
                for e, weight in zip(which[t], weights[t], strict=True):
                    inside = ACTS[f.act](gate[e] @ row) * (up[e] @ row)
                    y[t] += scale * weight * (down[e] @ inside)
        return y
