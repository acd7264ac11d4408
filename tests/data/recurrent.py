"""Recurrent halves of models that transformers does not have, in NumPy and float64, one row after another.

Each takes a model of modelling.py, a layer's prefix and normalised rows x [T, E], and gives [T, E].
"""

from __future__ import annotations

from typing import Any

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def before(x: np.ndarray) -> np.ndarray:
    """The row before each row; zeros before the first."""
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def mamba_by_head(m: Any, b: str, x: np.ndarray) -> np.ndarray:
    """PLaMo 2: heads with a rate and a decay each; B, C and the rate's low-rank part are normalised."""
    n, s, h = (m.k[f"ssm.{k}"] for k in ("inner_size", "state_size", "time_step_rank"))
    t, d = len(x), n // h
    both = m.linear(b + "ssm_in", x).reshape(t, h, 2, d)
    gate, x = both[:, :, 0], both[:, :, 1].reshape(t, n)
    weight = m.w[b + "ssm_conv1d.weight"]
    width = weight.shape[1]
    padded = np.concatenate([np.zeros((width - 1, n)), x])
    x = sum(padded[j : j + t] * weight[:, j] for j in range(width))
    x = x * sigmoid(x)
    low = m.linear(b + "ssm_x", x)
    into, out, dt = low[:, :s], low[:, s : 2 * s], low[:, 2 * s :]
    into, out, dt = (
        m.norm(b + f"ssm_{k}_norm", v) for k, v in (("b", into), ("c", out), ("dt", dt))
    )
    dt = np.log1p(np.exp(m.linear(b + "ssm_dt", dt)))
    state, x, rows = np.zeros((h, d, s)), x.reshape(t, h, d), []
    for i in range(t):
        decay = np.exp(dt[i] * m.w[b + "ssm_a"])[:, None, None]
        state = state * decay + dt[i][:, None, None] * x[i][:, :, None] * into[i]
        y = state @ out[i] + m.w[b + "ssm_d"][:, None] * x[i]
        rows.append((y * gate[i] * sigmoid(gate[i])).ravel())
    return m.linear(b + "ssm_out", np.array(rows))


def time_mix_6(m: Any, b: str, x: np.ndarray) -> np.ndarray:
    """RWKV 6 in Qwen 2: gated linear attention with grouped keys and values."""
    w, d, (t, e) = m.w, m.k["wkv.head_size"], x.shape
    n, kv = e // d, m.k.get("attention.head_count_kv", e // d)
    sx = before(x) - x
    base = x + sx * w[b + "time_mix_lerp_x.weight"].ravel()
    low = np.tanh(base @ w[b + "time_mix_w1.weight"].T).reshape(t, 5, -1)
    lerp = w[b + "time_mix_lerp_fused.weight"].reshape(5, e)
    up = w[b + "time_mix_w2.weight"]
    xw, xk, xv, xr, xg = (x + sx * (lerp[j] + low[:, j] @ up[j].T) for j in range(5))
    r = m.linear(b + "time_mix_receptance", xr).reshape(t, n, d)
    k, v = (m.linear(b + f"time_mix_{s}", y) for s, y in (("key", xk), ("value", xv)))
    k, v = (np.repeat(y.reshape(t, kv, d), n // kv, 1) for y in (k, v))
    gate = sigmoid(m.linear(b + "time_mix_gate", xg))
    decay = np.tanh(xw @ w[b + "time_mix_decay_w1.weight"].T) @ w[b + "time_mix_decay_w2.weight"].T
    decay = np.exp(-np.exp(decay + w[b + "time_mix_decay.weight"])).reshape(t, n, d)
    k = k * (1 - decay)
    state, rows = np.zeros((n, d, d)), []
    for i in range(t):
        state = state * decay[i][:, :, None] + k[i][:, :, None] * v[i][:, None]
        rows.append(np.einsum("hkv,hk->hv", state, r[i]).ravel() * d**-0.5)
    return m.linear(b + "time_mix_output", np.array(rows) * gate)


def time_mix_7(m: Any, b: str, x: np.ndarray) -> np.ndarray:
    """RWKV 7 in Qwen 2: a gate and a norm over heads only where the file has them."""
    w, d, (t, e) = m.w, m.k["wkv.head_size"], x.shape
    n, sx = e // d, before(x) - x
    lerp = w[b + "time_mix_lerp_fused.weight"].reshape(-1, e)
    xr, xw, xk, xv, xa, *xg = (x + sx * row for row in lerp)

    def low(s: str, y: np.ndarray, act: Any = lambda z: z) -> np.ndarray:
        first, second = (w[b + f"time_mix_{s}{j}.weight"] for j in (1, 2))
        return act(y @ first.T) @ second.T + w.get(b + f"time_mix_{s}0.weight", 0)

    r, k, v = (
        m.linear(b + f"time_mix_{s}", y)
        for s, y in (("receptance", xr), ("key", xk), ("value", xv))
    )
    decay = np.exp(-0.606531 * sigmoid(low("w", xw, np.tanh))).reshape(t, n, d)
    if b == "blk.0.":
        m.first_values = v
    else:
        v = v + (m.first_values - v) * sigmoid(low("v", xv))
    rate = sigmoid(low("a", xa))
    unit = (k * w[b + "time_mix_k_k.weight"]).reshape(t, n, d)
    unit = unit / np.maximum(np.sqrt((unit * unit).sum(-1, keepdims=True)), 1e-12)
    k = k * (1 + (rate - 1) * w[b + "time_mix_k_a.weight"])
    r, k, v, rate = (y.reshape(t, n, d) for y in (r, k, v, rate))
    state, rows = np.zeros((n, d, d)), []
    for i in range(t):
        removed = np.einsum("hvk,hk->hv", state, -unit[i])
        state = state * decay[i][:, None] + removed[:, :, None] * (unit[i] * rate[i])[:, None]
        state = state + v[i][:, :, None] * k[i][:, None]
        rows.append(np.einsum("hvk,hk->hv", state, r[i]))
    y = np.array(rows)
    if b + "time_mix_ln.weight" in w:
        y = y - y.mean(-1, keepdims=True)
        y = (y / np.sqrt((y * y).mean(-1, keepdims=True) + 64e-5)).reshape(t, e)
        y = y * w[b + "time_mix_ln.weight"] + w[b + "time_mix_ln.bias"]
    bonus = (k * r * w[b + "time_mix_r_k.weight"].reshape(n, d)).sum(-1, keepdims=True)
    y = y.reshape(t, n, d) + v * bonus
    y = y.reshape(t, e)
    if xg:
        y = y * low("g", xg[0], sigmoid)
    return m.linear(b + "time_mix_output", y)
