"""Layers that carry a state from token to token: Mamba's convolution and scan, RWKV's shift and mixing.

Pieces are independent channels or heads (of one sequence); the tokens of a sequence go one after another. The
state is the layer's float32 array, whose address stands in the cache's table at ``field``.
"""

from __future__ import annotations

import math

import numpy as np

from .attention import LAYER
from .simd import copy, get_f32, get_i32, get_i64, set_f32


def state_of(caches, seq, layer, field):
    """The address of a layer's array of a sequence."""
    return get_i64(get_i64(caches + 8 * seq) + layer * LAYER + 8 * field)


def conv1d(x, y, caches, starts, layer, field, n, width, w, bias, first, last, worker):
    """Causal convolution of each channel; a piece is one sequence's channel."""
    for piece in range(first, last):
        seq, i = piece // n, piece % n
        kept = state_of(caches, seq, layer, field) + 4 * i
        begin, end = get_i32(starts + 4 * seq), get_i32(starts + 4 * seq + 4)
        for t in range(begin, end):
            total = np.float32(0)
            for j in range(width - 1):
                total += get_f32(kept + 4 * n * j) * get_f32(w + 4 * (i * width + j))
            new = get_f32(x + 4 * (t * n + i))
            total += new * get_f32(w + 4 * (i * width + width - 1))
            for j in range(width - 2):
                set_f32(kept + 4 * n * j, get_f32(kept + 4 * n * (j + 1)))
            if width > 1:
                set_f32(kept + 4 * n * (width - 2), new)
            if bias != 0:
                total += get_f32(bias + 4 * i)
            set_f32(y + 4 * (t * n + i), total)


def scan(
    x, y, caches, starts, layer, field, n, size, dt, a, b, c, d, n_decay, n_group,
    first, last, worker,
):  # fmt: skip
    """h = exp(dt a) h + dt x b; y = h c + d x, for each channel; a piece is one sequence's channel."""
    for piece in range(first, last):
        seq, i = piece // n, piece % n
        group = i * n_group // n
        h = state_of(caches, seq, layer, field) + 4 * i * size
        begin, end = get_i32(starts + 4 * seq), get_i32(starts + 4 * seq + 4)
        for t in range(begin, end):
            step, here = get_f32(dt + 4 * (t * n + i)), get_f32(x + 4 * (t * n + i))
            total = np.float32(0)
            decay = np.float32(math.exp(step * get_f32(a + 4 * i * n_decay)))
            row = 4 * (t * n_group + group) * size
            for s in range(size):
                if n_decay > 1 and s > 0:
                    decay = np.float32(math.exp(step * get_f32(a + 4 * (i * size + s))))
                new = get_f32(h + 4 * s) * decay + step * here * get_f32(b + row + 4 * s)
                set_f32(h + 4 * s, new)
                total += new * get_f32(c + row + 4 * s)
            set_f32(y + 4 * (t * n + i), total + get_f32(d + 4 * i) * here)


def shift_rows(x, y, caches, starts, layer, field, n_bytes, first, last, worker):
    """Each row becomes the one before it; the last is kept. A piece is a sequence."""
    for seq in range(first, last):
        kept = state_of(caches, seq, layer, field)
        before = kept
        for t in range(get_i32(starts + 4 * seq), get_i32(starts + 4 * seq + 4)):
            copy(y + n_bytes * t, before, n_bytes)
            before = x + n_bytes * t
        if before != kept:
            copy(kept, before, n_bytes)


def wkv6(r, y, caches, starts, layer, field, n_head, dim, k, v, w, u, first, last, worker):
    """y = r (S + diag(u) k^T v); S = diag(w) S + k^T v. A piece is one sequence's head."""
    for piece in range(first, last):
        seq, head = piece // n_head, piece % n_head
        state = state_of(caches, seq, layer, field) + 4 * head * dim * dim
        for t in range(get_i32(starts + 4 * seq), get_i32(starts + 4 * seq + 4)):
            row = 4 * (t * n_head + head) * dim
            for j in range(dim):
                set_f32(y + row + 4 * j, np.float32(0))
            for i in range(dim):
                ri, ki = get_f32(r + row + 4 * i), get_f32(k + row + 4 * i)
                wi, ui = get_f32(w + row + 4 * i), get_f32(u + 4 * (head * dim + i))
                for j in range(dim):
                    at, out = state + 4 * (i * dim + j), y + row + 4 * j
                    kv, s = ki * get_f32(v + row + 4 * j), get_f32(at)
                    set_f32(out, get_f32(out) + ri * (s + ui * kv))
                    set_f32(at, wi * s + kv)


def wkv7(r, y, caches, starts, layer, field, n_head, dim, w, k, v, a, b, first, last, worker):
    """S = S diag(w) + (S a) b^T + v k^T; y = S r. A piece is one sequence's head."""
    for piece in range(first, last):
        seq, head = piece // n_head, piece % n_head
        state = state_of(caches, seq, layer, field) + 4 * head * dim * dim
        for t in range(get_i32(starts + 4 * seq), get_i32(starts + 4 * seq + 4)):
            row = 4 * (t * n_head + head) * dim
            for i in range(dim):
                s, removed, total = state + 4 * i * dim, np.float32(0), np.float32(0)
                vi = get_f32(v + row + 4 * i)
                for j in range(dim):
                    removed += get_f32(s + 4 * j) * get_f32(a + row + 4 * j)
                for j in range(dim):
                    at = row + 4 * j
                    new = get_f32(s + 4 * j) * get_f32(w + at) + removed * get_f32(b + at)
                    new += vi * get_f32(k + at)
                    set_f32(s + 4 * j, new)
                    total += new * get_f32(r + at)
                set_f32(y + row + 4 * i, total)
