/* Flash attention: for a tile of up to QUERIES (row, head) pairs that share a key head, one group of THREADS goes
   over the keys TILE at a time and keeps a running maximum, sum and weighted value (Dao et al., arXiv:2205.14135).

   The keys of a sequence are dealt over GROUP_ID(2) = 0 .. splits - 1 so that one long sequence fills the device;
   `attention_merge` joins the parts. HEAD_DIM and HEAD_DIM_V are compile-time. With DENSE, keys and values are the
   rows of this step themselves and attention goes both ways; otherwise they lie in pages (kv.h) and it is causal. */
#define THREADS 128
#define TILE 64
#define CHUNK 32 /* values of each key in local memory at a time */
#define PAD_D ((HEAD_DIM + CHUNK - 1) / CHUNK * CHUNK)
#define WIDTH(d) (((d) + KV_PIECE - 1) / KV_PIECE * KV_PIECE)
#define KEY_SETS (THREADS / TILE) /* threads that share a key, each with its own queries */
#define PER_THREAD ((QUERIES + KEY_SETS - 1) / KEY_SETS)
#define SHARES (THREADS / QUERIES < 16 ? THREADS / QUERIES : 16) /* threads that share a query's softmax */
#define V_SETS (HEAD_DIM_V >= THREADS ? 1 : THREADS / HEAD_DIM_V) /* as many queries at once as values fit */
#define V_STEPS ((HEAD_DIM_V + THREADS - 1) / THREADS)
#define V_QUERIES ((QUERIES + V_SETS - 1) / V_SETS)
#define LOWEST (-1.0e30f)

#ifdef DENSE
#define KV_ARGS GLOBAL const float *ks, GLOBAL const float *vs
#else
#define KV_ARGS                                                                                                    \
    GLOBAL uchar *store, GLOBAL const int *pages, const ulong page_bytes, const ulong k_offset, const ulong v_offset, \
        const int n_pages
#endif

/* How many positions back from i a query there sees, itself included; below 0 windows are chunks. */
INLINE int reach(const int i, const int window) { return window < 0 ? i % -window + 1 : window; }

INLINE float score(const float dot, const int i, const int j, const float scale, const int window, const float softcap,
                   const float slope) {
    float s = dot * scale;
    if (softcap != 0.0f) s = softcap * tanh(s / softcap);
#ifdef DENSE
    const int far = i > j ? i - j : j - i;
    if (window && far > window / 2) return LOWEST;
    return s - slope * (float)far;
#else
    if (j > i || (window && i - j >= reach(i, window))) return LOWEST;
    return s - slope * (float)(i - j);
#endif
}

#ifdef DENSE
/* Four values of a key from d on, zeros behind its end. */
INLINE float4 key_values(GLOBAL const float* k, const int d) {
    float4 v;
    v.x = d < HEAD_DIM ? k[d] : 0.0f;
    v.y = d + 1 < HEAD_DIM ? k[d + 1] : 0.0f;
    v.z = d + 2 < HEAD_DIM ? k[d + 2] : 0.0f;
    v.w = d + 3 < HEAD_DIM ? k[d + 3] : 0.0f;
    return v;
}
#endif

/* tiles [n][3]: sequence, first row, number of rows. out: the result, or with splits > 1 parts
   [T, H, splits, HEAD_DIM_V] whose maxima and sums go to `stats` [T, H, splits, 2]. */
KERNEL void attention(GLOBAL const float* q, KV_ARGS, GLOBAL float* out, GLOBAL float* stats, GLOBAL const float* slopes,
                      GLOBAL const float* sinks, GLOBAL const float* bias, GLOBAL const int* tiles,
                      GLOBAL const int* starts, GLOBAL const int* n_past, const int n_bias, const int n_head,
                      const int n_head_kv, const int heads_at_once, const int splits, const float scale,
                      const int window, const float softcap) {
    LOCAL float qs[QUERIES * PAD_D];
    LOCAL float tile[TILE * (CHUNK + 1)]; /* of keys */
    LOCAL float p[QUERIES * TILE];
    LOCAL float part[QUERIES * SHARES];
    LOCAL float top[QUERIES];
    LOCAL float sum[QUERIES];
    LOCAL float shrink[QUERIES];
    LOCAL int row_of[QUERIES];
    LOCAL int head_of[QUERIES];
    const int tid = LOCAL_ID(0), split = GROUP_ID(2);
    const int per_key = n_head / n_head_kv, chunks = (per_key + heads_at_once - 1) / heads_at_once;
    const int kv_head = GROUP_ID(0) / chunks, chunk = GROUP_ID(0) % chunks;
    const int seq = tiles[3 * GROUP_ID(1)], row0 = tiles[3 * GROUP_ID(1) + 1], n_rows = tiles[3 * GROUP_ID(1) + 2];
    const int start = starts[seq];
#ifdef DENSE
    const int past = 0, n_keys = starts[seq + 1] - start, last = row0 - start + n_rows - 1;
    const int first_key = window && row0 - start > window / 2 ? row0 - start - window / 2 : 0;
    const int end_key = window && last + window / 2 + 1 < n_keys ? last + window / 2 + 1 : n_keys;
#else
    const int past = n_past[seq], end_key = past + row0 - start + n_rows;
    const int first = past + row0 - start, seen = reach(first, window);
    const int first_key = window && first >= seen ? first - seen + 1 : 0;
#endif
    for (int i = tid; i < QUERIES; i += THREADS) {
        const int h = chunk * heads_at_once + i % heads_at_once, r = i / heads_at_once;
        row_of[i] = r < n_rows && h < per_key ? row0 + r : -1;
        head_of[i] = kv_head * per_key + h;
        top[i] = LOWEST;
        sum[i] = 0.0f;
    }
    BARRIER();
    for (int i = tid; i < QUERIES * PAD_D; i += THREADS) {
        const int s = i / PAD_D, d = i % PAD_D;
        const ulong at = ((ulong)row_of[s] * n_head + head_of[s]) * HEAD_DIM + d;
        qs[i] = row_of[s] >= 0 && d < HEAD_DIM ? q[at] : 0.0f;
    }
    float acc[V_QUERIES * V_STEPS];
    UNROLL for (int i = 0; i < V_QUERIES * V_STEPS; ++i) acc[i] = 0.0f;
    for (int k0 = (first_key / TILE + split) * TILE; k0 < end_key; k0 += splits * TILE) {
        const int key = tid % TILE, j = k0 + key, set = tid / TILE;
#ifndef DENSE
        GLOBAL const uchar* kp = page_of(store, page_bytes, k_offset, pages, n_pages, seq, k0);
        GLOBAL const uchar* vp = page_of(store, page_bytes, v_offset, pages, n_pages, seq, k0);
#endif
        float dots[PER_THREAD];
        UNROLL for (int i = 0; i < PER_THREAD; ++i) dots[i] = 0.0f;
        for (int d0 = 0; d0 < HEAD_DIM; d0 += CHUNK) {
            BARRIER();
            for (int i = tid; i < TILE * CHUNK / 4; i += THREADS) {
                const int row = i / (CHUNK / 4), d = i % (CHUNK / 4) * 4;
                const int there = k0 + row < end_key ? k0 + row : end_key - 1; /* scores behind the end count nothing */
#ifdef DENSE
                const float4 k = key_values(ks + ((ulong)(start + there) * n_head_kv + kv_head) * HEAD_DIM, d0 + d);
#else
                const int from = d0 + d < WIDTH(HEAD_DIM) ? d0 + d : 0; /* behind the width queries are zeros */
                const float4 k = kv_load4(kp, n_head_kv * PAGE, kv_head * PAGE + there % PAGE, WIDTH(HEAD_DIM), from);
#endif
                SHARED float* to = tile + row * (CHUNK + 1) + d;
                to[0] = k.x;
                to[1] = k.y;
                to[2] = k.z;
                to[3] = k.w;
            }
            BARRIER();
            UNROLL for (int d = 0; d < CHUNK; ++d) {
                const float k = tile[key * (CHUNK + 1) + d];
                UNROLL for (int i = 0; i < PER_THREAD; ++i)
                    if (set + i * KEY_SETS < QUERIES) dots[i] += qs[(set + i * KEY_SETS) * PAD_D + d0 + d] * k;
            }
        }
        UNROLL for (int i = 0; i < PER_THREAD; ++i) {
            const int s = set + i * KEY_SETS;
            if (s < QUERIES)
                p[s * TILE + key] = j < end_key && row_of[s] >= 0
                                        ? score(dots[i], past + row_of[s] - start, j, scale, window, softcap,
                                                slopes ? slopes[head_of[s]] : 0.0f)
                                        : LOWEST;
            if (bias && s < QUERIES && row_of[s] >= 0) {
                const int most = n_bias / 2, away = j - (past + row_of[s] - start);
                const int at = most + (away < -most ? -most : away > most ? most : away);
                p[s * TILE + key] += bias[head_of[s] * n_bias + at];
            }
        }
        BARRIER();
        const int mine = tid / SHARES, at = mine * TILE + tid % SHARES; /* a query, and my first of its scores */
        float m = LOWEST;
        if (mine < QUERIES) {
            for (int i = 0; i < TILE; i += SHARES) m = fmax(m, p[at + i]);
            part[tid] = m;
        }
        BARRIER();
        if (mine < QUERIES) {
            for (int i = 0; i < SHARES; ++i) m = fmax(m, part[mine * SHARES + i]);
            m = fmax(m, top[mine]);
        }
        BARRIER();
        if (mine < QUERIES) {
            float total = 0.0f;
            for (int i = 0; i < TILE; i += SHARES) {
                p[at + i] = p[at + i] > 0.5f * LOWEST ? exp(p[at + i] - m) : 0.0f;
                total += p[at + i];
            }
            part[tid] = total;
        }
        BARRIER();
        if (mine < QUERIES && tid % SHARES == 0) {
            shrink[mine] = exp(top[mine] - m);
            top[mine] = m;
            sum[mine] *= shrink[mine];
            for (int i = 0; i < SHARES; ++i) sum[mine] += part[tid + i];
        }
        BARRIER();
        const int n = end_key - k0 < TILE ? end_key - k0 : TILE, v_set = tid / HEAD_DIM_V;
        UNROLL for (int step = 0; step < V_STEPS; ++step) {
            const int d = V_STEPS == 1 ? tid % HEAD_DIM_V : tid + step * THREADS;
            if (d >= HEAD_DIM_V || (V_STEPS == 1 && v_set >= V_SETS)) continue;
            const int first = V_STEPS == 1 ? v_set : 0;
            UNROLL for (int i = 0; i < V_QUERIES; ++i)
                if (first + i * V_SETS < QUERIES) acc[i * V_STEPS + step] *= shrink[first + i * V_SETS];
            for (int key2 = 0; key2 < n; ++key2) {
#ifdef DENSE
                const float v = vs[((ulong)(start + k0 + key2) * n_head_kv + kv_head) * HEAD_DIM_V + d];
#else
                const float v = kv_load(vp, n_head_kv * PAGE, kv_head * PAGE + key2, WIDTH(HEAD_DIM_V), d);
#endif
                UNROLL for (int i = 0; i < V_QUERIES; ++i)
                    if (first + i * V_SETS < QUERIES)
                        acc[i * V_STEPS + step] += p[(first + i * V_SETS) * TILE + key2] * v;
            }
        }
    }
    BARRIER();
    UNROLL for (int step = 0; step < V_STEPS; ++step) {
        const int d = V_STEPS == 1 ? tid % HEAD_DIM_V : tid + step * THREADS, v_set = tid / HEAD_DIM_V;
        if (d >= HEAD_DIM_V || (V_STEPS == 1 && v_set >= V_SETS)) continue;
        UNROLL for (int i = 0; i < V_QUERIES; ++i) {
            const int s = (V_STEPS == 1 ? v_set : 0) + i * V_SETS;
            if (s >= QUERIES || row_of[s] < 0) continue;
            const ulong at = (ulong)row_of[s] * n_head + head_of[s];
            if (splits > 1) {
                out[(at * splits + split) * HEAD_DIM_V + d] = acc[i * V_STEPS + step];
                if (d == 0) {
                    stats[(at * splits + split) * 2] = top[s];
                    stats[(at * splits + split) * 2 + 1] = sum[s];
                }
            } else {
                const float sink = sinks ? sinks[head_of[s]] : LOWEST, m = fmax(top[s], sink);
                const float total = sum[s] * exp(top[s] - m) + (sinks ? exp(sink - m) : 0.0f);
                out[at * HEAD_DIM_V + d] = acc[i * V_STEPS + step] * exp(top[s] - m) / total;
            }
        }
    }
}

/* Join the parts of one (row, head): a group each, a thread for each value. */
KERNEL void attention_merge(GLOBAL const float* parts, GLOBAL const float* stats, GLOBAL const float* sinks,
                            GLOBAL float* out, const int n_head, const int splits) {
    const ulong at = (ulong)GROUP_ID(0);
    const int h = GROUP_ID(0) % n_head;
    float top = sinks ? sinks[h] : LOWEST;
    for (int s = 0; s < splits; ++s) top = fmax(top, stats[(at * splits + s) * 2]);
    float total = sinks ? exp(sinks[h] - top) : 0.0f;
    for (int s = 0; s < splits; ++s) total += stats[(at * splits + s) * 2 + 1] * exp(stats[(at * splits + s) * 2] - top);
    for (int d = LOCAL_ID(0); d < HEAD_DIM_V; d += LOCAL_SIZE(0)) {
        float v = 0.0f;
        for (int s = 0; s < splits; ++s)
            v += parts[(at * splits + s) * HEAD_DIM_V + d] * exp(stats[(at * splits + s) * 2] - top);
        out[at * HEAD_DIM_V + d] = v / total;
    }
}
