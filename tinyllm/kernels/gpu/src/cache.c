/* New keys or values into the cache, and moved ones out of it. */

/* Keys x [T, heads * d] to positions of the sequences seqs [T], and in groups with GROUP_ID(1) = 1 values the same
   way; one thread for each piece. */
KERNEL void cache_write(GLOBAL const float* k, GLOBAL const float* v, GLOBAL uchar* store, GLOBAL const int* pages,
                        GLOBAL const int* seqs, GLOBAL const int* positions, const ulong page_bytes,
                        const ulong k_offset, const ulong v_offset, const int n_pages, const int heads, const int k_d,
                        const int v_d, const int k_width, const int v_width, const int n_rows) {
    const int i = GLOBAL_ID(0), is_v = GROUP_ID(1);
    const int d = is_v ? v_d : k_d, width = is_v ? v_width : k_width, pieces = width / KV_PIECE;
    if (i >= n_rows * heads * pieces) return;
    const int p = i % pieces, h = i / pieces % heads, t = i / (pieces * heads), pos = positions[t];
    GLOBAL uchar* base = page_of(store, page_bytes, is_v ? v_offset : k_offset, pages, n_pages, seqs[t], pos);
    GLOBAL const float* x = (is_v ? v : k) + ((ulong)t * heads + h) * (ulong)d;
    kv_store(base, heads * PAGE, h * PAGE + pos % PAGE, width, p, d, x);
}

/* Positions first .. first + n of one sequence as float [n, heads * d]. */
KERNEL void cache_read(GLOBAL uchar* store, GLOBAL const int* pages, GLOBAL float* y, const ulong page_bytes,
                       const ulong offset, const int first, const int heads, const int d, const int width,
                       const int count) {
    const int i = GLOBAL_ID(0);
    if (i >= count) return;
    const int h = i / d % heads, pos = first + i / (d * heads);
    GLOBAL const uchar* base = page_of(store, page_bytes, offset, pages, 0, 0, pos);
    y[i] = kv_load(base, heads * PAGE, h * PAGE + pos % PAGE, width, i % d);
}

/* Value i of a head in `x`, turned by an angle of `position`; see Backend.rope. */
INLINE float turned(SHARED const float* x, const int i, const float position, GLOBAL const float* freqs,
                    const int first, const int p, const int adjacent, const float scale) {
    const int j = i - first;
    if (j < 0 || j >= 2 * p) return x[i];
    const int pair = adjacent ? j / 2 : j % p, second = adjacent ? j & 1 : j >= p, step = adjacent ? 1 : p;
    const float angle = position * freqs[pair];
    const float c = cos(angle) * scale, s = sin(angle) * scale;
    return second ? x[i - step] * s + x[i] * c : x[i] * c - x[i + step] * s;
}

#define THREADS 128
#define MOST_DIM 1024 /* of a head */
#define ROPE_WRITE_ARGS                                                                                            \
    GLOBAL const float *q, GLOBAL const float *k, GLOBAL const float *v, GLOBAL float *y, GLOBAL uchar *store,         \
        GLOBAL const int *pages, GLOBAL const int *seqs, GLOBAL const int *positions, GLOBAL const float *freqs,      \
        GLOBAL const float *q_norm, GLOBAL const float *k_norm, const ulong page_bytes, const ulong k_offset,         \
        const ulong v_offset, const int n_pages, const int n_head, const int n_head_kv, const int k_d, const int v_d, \
        const int k_width, const int v_width, const int first, const int p, const int adjacent, const float scale,    \
        const float eps

/* A head of a row for each group: those of q [T, n_head, k_d] are turned, to y; those of k are turned and stored,
   those of v stored. With `normed`, q and k go through an RMS norm of each head first, with weights [k_d]. */
INLINE void rope_write_head(const int normed, ROPE_WRITE_ARGS, SHARED float* x, SHARED float* part) {
    const int tid = LOCAL_ID(0), t = GROUP_ID(1), pos = positions[t];
    const int is_q = GROUP_ID(0) < n_head, is_v = GROUP_ID(0) >= n_head + n_head_kv;
    const int h = GROUP_ID(0) - (is_q ? 0 : is_v ? n_head + n_head_kv : n_head), heads = is_q ? n_head : n_head_kv;
    const int d = is_v ? v_d : k_d, width = is_q ? d : is_v ? v_width : k_width;
    const ulong at = ((ulong)t * (ulong)heads + (ulong)h) * (ulong)d;
    GLOBAL const float* in = (is_q ? q : is_v ? v : k) + at;
    GLOBAL uchar* base = page_of(store, page_bytes, is_v ? v_offset : k_offset, pages, n_pages, seqs[t], pos);
    float total = 0.0f;
    for (int i = tid; i < d; i += THREADS) {
        x[i] = in[i];
        total += x[i] * x[i];
    }
    if (normed) { /* a constant where this is inlined */
        const float shrink = 1.0f / sqrt(group_sum(total, part) / (float)d + eps);
        GLOBAL const float* w = is_q ? q_norm : k_norm;
        for (int i = tid; i < d && !is_v; i += THREADS) x[i] *= shrink * w[i];
    }
    BARRIER();
    for (int i0 = 0; i0 < width; i0 += THREADS) {
        const int i = i0 + tid;
        float value = 0.0f, top = 0.0f;
        if (i < d) value = is_v ? x[i] : turned(x, i, (float)pos, freqs, first, p, adjacent, scale);
#if KV == 2
        top = fabs(value);
        for (int o = 16; o > 0; o >>= 1) top = fmax(top, lane_xor(top, o, part));
#endif
        if (i >= width) continue;
        if (is_q)
            y[at + (ulong)i] = value;
        else
            kv_store_value(base, heads * PAGE, h * PAGE + pos % PAGE, width, i, value, top);
    }
}

#define ROPE_WRITE(name, normed)                                                                                   \
    KERNEL void name(ROPE_WRITE_ARGS) {                                                                            \
        LOCAL float x[MOST_DIM];                                                                                   \
        LOCAL float part[THREADS + 32];                                                                            \
        rope_write_head(normed, q, k, v, y, store, pages, seqs, positions, freqs, q_norm, k_norm, page_bytes,      \
                        k_offset, v_offset, n_pages, n_head, n_head_kv, k_d, v_d, k_width, v_width, first, p,      \
                        adjacent, scale, eps, x, part);                                                            \
    }
ROPE_WRITE(rope_write, 0)
ROPE_WRITE(norm_rope_write, 1)
