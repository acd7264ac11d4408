/* One thread for each value. */
KERNEL void act(GLOBAL const float* x, GLOBAL float* y, const int kind, const int n) {
    const int i = GLOBAL_ID(0);
    if (i < n) y[i] = activate(x[i], kind);
}

KERNEL void act_mul(GLOBAL const float* gate, GLOBAL const float* up, GLOBAL float* y, const int kind, const int n) {
    const int i = GLOBAL_ID(0);
    if (i < n) y[i] = gated(gate[i], up[i], kind);
}

/* x [T, n] + scale * b, or x * b when `product`; b's strides say whether it is [T, n], [T, 1] or [n]. */
KERNEL void combine_two(GLOBAL const float* x, GLOBAL const float* b, GLOBAL float* y, const int n, const int b_row,
                        const int b_col, const float scale, const int product, const int count) {
    const int i = GLOBAL_ID(0);
    if (i >= count) return;
    const float v = b[(i / n) * b_row + (i % n) * b_col];
    y[i] = product ? x[i] * v : x[i] + scale * v;
}

KERNEL void scale_softcap(GLOBAL const float* x, GLOBAL float* y, const float scale, const float cap, const int n) {
    const int i = GLOBAL_ID(0);
    if (i >= n) return;
    const float v = x[i] * scale;
    y[i] = cap != 0.0f ? cap * tanh(v / cap) : v;
}

KERNEL void clamp_all(GLOBAL const float* x, GLOBAL float* y, const float limit, const int n) {
    const int i = GLOBAL_ID(0);
    if (i < n) y[i] = fmin(fmax(x[i], -limit), limit);
}

/* Part of a join: x [T, heads, d], or [T, 1, d] for every head, to values first .. first + d of y [T, heads, width]. */
KERNEL void join(GLOBAL const float* x, GLOBAL float* y, const int heads, const int x_heads, const int d, const int first,
                 const int width, const int count) {
    const int i = GLOBAL_ID(0);
    if (i >= count) return;
    const int t = i / (heads * d), h = (i / d) % heads, j = i % d;
    y[(t * heads + h) * width + first + j] = x[(t * x_heads + (x_heads == 1 ? 0 : h)) * d + j];
}

/* y [n_rows, n] = x[rows] */
KERNEL void take(GLOBAL const float* x, GLOBAL const int* rows, GLOBAL float* y, const int n, const int count) {
    const int i = GLOBAL_ID(0);
    if (i < count) y[i] = x[(ulong)rows[i / n] * (ulong)n + (ulong)(i % n)];
}

/* Turn pairs of each head of x [T, H * d]; see Backend.rope. `adjacent` pairs (2 i, 2 i + 1), else (i, i + p). */
KERNEL void rope(GLOBAL const float* x, GLOBAL const int* positions, GLOBAL const float* freqs, GLOBAL float* y,
                 const int row, const int d, const int first, const int p, const int adjacent, const float scale,
                 const int count) {
    const int i = GLOBAL_ID(0);
    if (i >= count) return;
    const int j = i % row % d - first;
    if (j < 0 || j >= 2 * p) {
        y[i] = x[i];
        return;
    }
    const int pair = adjacent ? j / 2 : j % p, second = adjacent ? j & 1 : j >= p;
    const int step = adjacent ? 1 : p;
    const float angle = (float)positions[i / row] * freqs[pair];
    const float c = cos(angle) * scale, s = sin(angle) * scale;
    y[i] = second ? x[i - step] * s + x[i] * c : x[i] * c - x[i + step] * s;
}
