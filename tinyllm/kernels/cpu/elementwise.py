"""Norms, rotary embedding, activations, sums and the other small operations on rows of float32.

A piece is usually a row. Rows need not be whole vectors: the last one is loaded and stored with a mask.
"""

from __future__ import annotations

import math

import numpy as np

from . import jit
from .floats import as_float
from .simd import (
    copy,
    erf,
    exp,
    f32,
    fma,
    get_f32,
    get_i32,
    hsum,
    load_n,
    set_f32,
    set_half,
    set_i32,
    splat,
    store_half,
    store_n,
    tanh,
    vmax,
    vmin,
)


def row_sum(x, n):
    """The sum of n floats: lane by lane, then the lanes."""
    total = splat(np.float32(0))
    for i in range(0, n, 16):
        total = total + load_n(x + 4 * i, n - i)
    return hsum(total)


def affine(v, w, bias, i, n):
    """v * w + bias, either address 0 for none."""
    if w != 0:
        v = v * load_n(w + 4 * i, n - i)
    if bias != 0:
        v = v + load_n(bias + 4 * i, n - i)
    return v


def rms_norm(x, y, w, bias, n, eps: f32, w_period, b_period, first, last, worker):
    """Rows of n: x / sqrt(mean(x^2) + eps) * w + bias. w holds n values for each of ``w_period`` rows, bias
    for each of ``b_period``; where there is none, its address and its period are 0.
    """
    for row in range(first, last):
        p, out = x + 4 * n * row, y + 4 * n * row
        total = splat(np.float32(0))
        for i in range(0, n, 16):
            v = load_n(p + 4 * i, n - i)
            total = fma(v, v, total)
        mean = hsum(total) / as_float(n)
        scale = splat(np.float32(1) / np.float32(math.sqrt(mean + eps)))
        w_row = w + 4 * n * (row % w_period) if w != 0 else 0
        b_row = bias + 4 * n * (row % b_period) if bias != 0 else 0
        for i in range(0, n, 16):
            v = load_n(p + 4 * i, n - i) * scale
            store_n(out + 4 * i, affine(v, w_row, b_row, i, n), n - i)


def layer_norm(x, y, w, bias, n, eps: f32, w_period, b_period, more, first, last, worker):
    """Rows of n: (x - mean) / sqrt(variance + eps) * w + bias, of x + more if there is more."""
    for row in range(first, last):
        p, out = x + 4 * n * row, y + 4 * n * row
        if more != 0:
            q = more + 4 * n * row
            for i in range(0, n, 16):
                store_n(out + 4 * i, load_n(p + 4 * i, n - i) + load_n(q + 4 * i, n - i), n - i)
            p = out
        mean = splat(row_sum(p, n) / as_float(n))
        for i in range(0, n, 16):
            store_n(out + 4 * i, load_n(p + 4 * i, n - i) - mean, n - i)
        total = splat(np.float32(0))
        for i in range(0, n, 16):
            v = load_n(out + 4 * i, n - i)
            total = fma(v, v, total)
        variance = hsum(total) / as_float(n)
        scale = splat(np.float32(1) / np.float32(math.sqrt(variance + eps)))
        w_row = w + 4 * n * (row % w_period) if w != 0 else 0
        b_row = bias + 4 * n * (row % b_period) if bias != 0 else 0
        for i in range(0, n, 16):
            v = load_n(out + 4 * i, n - i) * scale
            store_n(out + 4 * i, affine(v, w_row, b_row, i, n), n - i)


def rope_table(positions, freqs, table, pairs, scale: f32, first, last, worker):
    """Cosines then sines of position * frequency, times scale: [T, 2, pairs]; a piece is a row."""
    for t in range(first, last):
        position = as_float(get_i32(positions + 4 * t))
        out = table + 8 * pairs * t
        for i in range(pairs):
            angle = np.float64(position * get_f32(freqs + 4 * i))
            set_f32(out + 4 * i, np.float32(math.cos(angle)) * scale)
            set_f32(out + 4 * (pairs + i), np.float32(math.sin(angle)) * scale)


def rope(x, y, table, n_head, head_dim, pairs, start, step, apart, first, last, worker):
    """Turn the pairs of every head of a row. Members of pair i stand at first + i * step and ``apart`` on."""
    n = n_head * head_dim
    for t in range(first, last):
        cosines = table + 8 * pairs * t
        sines = cosines + 4 * pairs
        copy(y + 4 * n * t, x + 4 * n * t, 4 * n)
        for h in range(n_head):
            p = x + 4 * (n * t + h * head_dim + start)
            q = y + 4 * (n * t + h * head_dim + start)
            for i in range(pairs):
                c, s = get_f32(cosines + 4 * i), get_f32(sines + 4 * i)
                a, b = get_f32(p + 4 * i * step), get_f32(p + 4 * (i * step + apart))
                set_f32(q + 4 * i * step, a * c - b * s)
                set_f32(q + 4 * (i * step + apart), a * s + b * c)


def sigmoid(x):
    """1 / (1 + e^-x)."""
    one = splat(np.float32(1))
    return one / (one + exp(splat(np.float32(0)) - x))


def silu(x):
    """x / (1 + e^-x)."""
    return x * sigmoid(x)


def gelu(x):
    """x times the normal distribution's mass below x."""
    mass = splat(np.float32(1)) + erf(x * splat(np.float32(0.7071067811865476)))
    return splat(np.float32(0.5)) * x * mass


def gelu_tanh(x):
    """GELU with the approximation of the normal distribution by tanh."""
    inner = x + splat(np.float32(0.044715)) * x * x * x
    mass = splat(np.float32(1)) + tanh(splat(np.float32(0.7978845608028654)) * inner)
    return splat(np.float32(0.5)) * x * mass


def relu(x):
    """max(x, 0)."""
    return vmax(x, splat(np.float32(0)))


def relu2(x):
    """max(x, 0) squared."""
    return relu(x) * relu(x)


def swiglu_oai(gate, up):
    """g sigmoid(1.702 g) (u + 1), both bounded by 7."""
    seven = splat(np.float32(7))
    g, u = vmin(gate, seven), vmax(vmin(up, seven), splat(np.float32(-7)))
    return g * sigmoid(splat(np.float32(1.702)) * g) * (u + splat(np.float32(1)))


activate = silu


def act(x, up, y, n, first, last, worker):
    """act(x), or act(x) * up if there is one; a piece is 1024 values."""
    for i in range(1024 * first, min(1024 * last, n), 16):
        v = activate(load_n(x + 4 * i, n - i))
        if up != 0:
            v = v * load_n(up + 4 * i, n - i)
        store_n(y + 4 * i, v, n - i)


def act_swiglu(x, up, y, n, first, last, worker):
    """The activation that needs both of its arguments."""
    for i in range(1024 * first, min(1024 * last, n), 16):
        v = swiglu_oai(load_n(x + 4 * i, n - i), load_n(up + 4 * i, n - i))
        store_n(y + 4 * i, v, n - i)


def act_softplus(x, up, y, n, first, last, worker):
    """log(1 + e^x), one value at a time, in float64."""
    for i in range(1024 * first, min(1024 * last, n)):
        v = np.float64(get_f32(x + 4 * i))
        v = np.float32(max(v, 0.0) + math.log1p(math.exp(-abs(v))))
        set_f32(y + 4 * i, v * get_f32(up + 4 * i) if up != 0 else v)


ACTIVATIONS = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "relu2": relu2,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "exp": exp,
    "softplus": None,
    "swiglu_oai": None,
}


def act_kernel(kind: str) -> jit.Kernel:
    """The kernel of an activation function."""
    if kind == "softplus":
        return jit.kernel(act_softplus)
    if kind == "swiglu_oai":
        return jit.kernel(act_swiglu)
    return jit.kernel(act, f"act_{kind}", activate=ACTIVATIONS[kind])


def add(x, y, out, n, y_step, scale: f32, first, last, worker):
    """x + scale * y by rows of n; a y of one row is added to all. A piece is a row."""
    scale = splat(scale)
    for row in range(first, last):
        p, q, to = x + 4 * n * row, y + y_step * row, out + 4 * n * row
        for i in range(0, n, 16):
            v = load_n(p + 4 * i, n - i) + scale * load_n(q + 4 * i, n - i)
            store_n(to + 4 * i, v, n - i)


def mul(x, y, out, n, y_step, single, first, last, worker):
    """x * y by rows of n; y has rows of n, one row for all, or (``single``) a value for each row."""
    for row in range(first, last):
        p, q, to = x + 4 * n * row, y + y_step * row, out + 4 * n * row
        for i in range(0, n, 16):
            f = splat(get_f32(q)) if single != 0 else load_n(q + 4 * i, n - i)
            store_n(to + 4 * i, load_n(p + 4 * i, n - i) * f, n - i)


def scale_softcap(x, y, n, scale: f32, cap: f32, limit: f32, first, last, worker):
    """x * scale, bounded by ``limit`` or bent by ``cap`` unless these are 0; a piece is 1024 values."""
    scale = splat(scale)
    for i in range(1024 * first, min(1024 * last, n), 16):
        v = load_n(x + 4 * i, n - i) * scale
        if cap != np.float32(0):
            v = splat(cap) * tanh(v / splat(cap))
        if limit != np.float32(0):
            v = vmax(vmin(v, splat(limit)), splat(-limit))
        store_n(y + 4 * i, v, n - i)


def concat(x, y, n_bytes, y_bytes, offset, first, last, worker):
    """Copy x [T * heads, bytes] to a place in rows of ``y_bytes``; a piece is a row of x."""
    for row in range(first, last):
        copy(y + y_bytes * row + offset, x + n_bytes * row, n_bytes)


def take(x, rows, y, n_bytes, first, last, worker):
    """y[i] = x[rows[i]]; a piece is a row."""
    for i in range(first, last):
        copy(y + n_bytes * i, x + n_bytes * get_i32(rows + 4 * i), n_bytes)


def save(x, y, n, begin, first, last, worker):
    """Rows of n floats, from row ``begin`` on, to y; a piece is a row."""
    for i in range(first, last):
        copy(y + 4 * n * i, x + 4 * n * (begin + i), 4 * n)


def save_half(x, y, n, begin, first, last, worker):
    """Rows of n floats, from row ``begin`` on, to y as halves; a piece is a row."""
    for i in range(first, last):
        p, out, done = x + 4 * n * (begin + i), y + 2 * n * i, n // 16 * 16
        for j in range(0, done, 16):
            store_half(out + 2 * j, load_n(p + 4 * j, 16))
        for j in range(done, n):
            set_half(out + 2 * j, get_f32(p + 4 * j))


def combine(x, weights, y, k, n, first, last, worker):
    """Sum over k of x [T, k, n] * weights [T, k]; a piece is a row."""
    for t in range(first, last):
        for i in range(0, n, 16):
            total = splat(np.float32(0))
            for j in range(k):
                v = load_n(x + 4 * ((t * k + j) * n + i), n - i)
                total = fma(v, splat(get_f32(weights + 4 * (t * k + j))), total)
            store_n(y + 4 * (t * n + i), total, n - i)


def softmax(x, y, n):
    """Softmax of n floats at x, written to y."""
    most = get_f32(x)
    for i in range(1, n):
        most = max(most, get_f32(x + 4 * i))
    for i in range(0, n, 16):
        store_n(y + 4 * i, exp(load_n(x + 4 * i, n - i) - splat(most)), n - i)
    total = splat(row_sum(y, n))
    for i in range(0, n, 16):
        store_n(y + 4 * i, load_n(y + 4 * i, n - i) / total, n - i)


def best(values, n):
    """The place of the largest of n floats, the first of equals."""
    found = 0
    for i in range(1, n):
        if get_f32(values + 4 * i) > get_f32(values + 4 * found):
            found = i
    return found


def route(
    logits, bias, experts, weights, n, k, gating, renormalise, scale: f32, n_group,
    n_group_used, scratch, scratch_bytes,
    first, last, worker,
):  # fmt: skip
    """Choose k experts of a row: see ``Backend.route``. Scratch holds two rows of n and the groups."""
    scores = scratch + worker * scratch_bytes
    choice, groups = scores + 4 * n, scores + 8 * n
    never = np.float32(-np.inf)
    for t in range(first, last):
        row = logits + 4 * n * t
        if gating == 0:
            softmax(row, scores, n)
        else:
            for i in range(0, n, 16):
                v = load_n(row + 4 * i, n - i)
                store_n(scores + 4 * i, sigmoid(v) if gating == 1 else v, n - i)
        for i in range(n):
            b = get_f32(bias + 4 * i) if bias != 0 else np.float32(0)
            set_f32(choice + 4 * i, get_f32(scores + 4 * i) + b)
        if n_group > 1:
            keep_groups(choice, groups, n, n_group, n_group_used)
        chosen, picked = experts + 4 * k * t, weights + 4 * k * t
        total = np.float32(0)
        for j in range(k):
            e = best(choice, n)
            set_f32(choice + 4 * e, never)
            set_i32(chosen + 4 * j, e)
            set_f32(picked + 4 * j, get_f32(scores + 4 * e))
            total += get_f32(scores + 4 * e)
        if gating == 2:
            softmax(picked, picked, k)
        for j in range(k):
            w = get_f32(picked + 4 * j)
            if gating != 2 and renormalise != 0:
                w /= total
            set_f32(picked + 4 * j, w * scale)


def keep_groups(choice, groups, n, n_group, n_used):
    """Leave only experts of the n_used groups whose two best scores sum highest."""
    size, never = n // n_group, np.float32(-np.inf)
    for g in range(n_group):
        one = two = never
        for i in range(size):
            v = get_f32(choice + 4 * (g * size + i))
            if v > one:
                one, two = v, one
            elif v > two:
                two = v
        set_f32(groups + 4 * g, one + two)
        set_i32(groups + 4 * (n_group + g), 0)
    for _ in range(n_used):
        g = best(groups, n_group)
        set_f32(groups + 4 * g, never)
        set_i32(groups + 4 * (n_group + g), 1)
    for g in range(n_group):
        if get_i32(groups + 4 * (n_group + g)) == 1:
            continue
        for i in range(size):
            set_f32(choice + 4 * (g * size + i), never)
