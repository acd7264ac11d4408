/* What becomes of the sums of a group of attention_tensor.c: values and weights of its pairs meet in local memory, go to
   memory as a part of the past, are joined with the other parts, and become the result and its int8 form. */
#define WARPS (ROW_WARPS * KEY_WARPS)
#define THREADS (32 * WARPS)
#define PAIRS (16 * ROW_WARPS)
#define N_VALUES (HEAD_DIM_V / 8)
#define PITCH (HEAD_DIM_V + 8) /* floats of a pair when warps meet */
#define LOWEST (-1.0e30f)
#define LOG2E 1.4426950408889634f
#if KV == 2 /* a thread has every other column of 16 in one matrix, those between in the next one */
#define DIM_OF(n, column) ((n) / 2 * 16 + 2 * (column) + (n) % 2)
#else
#define DIM_OF(n, column) (8 * (n) + (column))
#endif

/* What a group looks after. Of each pair: row * n_head + head, or -1 where there is none, the head, the position. */
typedef struct {
    int at[PAIRS], head[PAIRS], pos[PAIRS];
    int n_pairs, seq, kv_head, first_pos, end_key, window;
} Part;

/* What values in units of exp2(-top) with this sum are to be multiplied with, the head's sink taking its share. */
INLINE float share(const float top, const float sum, GLOBAL const float* sinks, const int head) {
    if (!sinks) return 1.0f / sum;
    const float sink = sinks[head] * LOG2E, both = fmax(top, sink), shrink = exp2_fast(top - both);
    return shrink / (sum * shrink + exp2_fast(sink - both));
}

#if HEAD_DIM_V % 32 == 0
/* The int8 form of four values in each of eight neighbouring lanes, a run of 32 (see quantise_quad in rows.c). */
INLINE void keep_int8(const float* v, const ulong quad, const int there, GLOBAL int* xq, GLOBAL float* xd,
                      GLOBAL float* xs WARP_ARGS) {
    float top = fmax(fmax(fabs(v[0]), fabs(v[1])), fmax(fabs(v[2]), fabs(v[3])));
    UNROLL for (int o = 1; o < 8; o *= 2) top = fmax(top, lane_xor(top, o));
    const float inverse = top > 0.0f ? 127.0f / top : 0.0f, d = top / 127.0f;
    uint packed = 0;
    float sum = 0.0f;
    UNROLL for (int c = 0; c < 4; ++c) {
        const float code = rint(v[c] * inverse);
        packed |= ((uint)(int)code & 255u) << (8 * c);
        sum += code;
    }
    sum += lane_xor(sum, 1);
    sum += lane_xor(sum, 2);
    if (!there) return;
    xq[quad] = (int)packed;
    if (quad % 4 == 0) xs[quad / 4] = d * sum;
    if (quad % 8 == 0) xd[quad / 8] = d;
}
#endif

/* Where results go: out [T, H, HEAD_DIM_V] and its int8 form or NULL; parts [T, H, splits, HEAD_DIM_V + 4], each
   with its top and sum behind its values. */
typedef struct {
    GLOBAL float* out;
    GLOBAL int* xq;
    GLOBAL float *xd, *xs, *parts;
    GLOBAL const float* sinks;
    int split, splits;
} Result;

/* Where a pair's part or result begins. */
INLINE GLOBAL float* place_of(SHARED const Part* p, const Result* r, const int i) {
    const ulong at = (ulong)p->at[i];
    return r->splits > 1 ? r->parts + (at * r->splits + r->split) * (HEAD_DIM_V + 4) : r->out + at * HEAD_DIM_V;
}

/* Write what the registers of a warp's lanes hold of the pairs i0 and i0 + 8. */
INLINE void keep_registers(const float* o, const float* top, const float* sum, SHARED const Part* p, const Result* r,
                           const int i0) {
    const int t = LOCAL_ID(0) % 4;
    UNROLL for (int h = 0; h < 2; ++h) {
        const int i = i0 + 8 * h;
        if (p->at[i] < 0) continue;
        GLOBAL float* to = place_of(p, r, i) + DIM_OF(0, 2 * t);
        const float f = r->splits > 1 ? 1.0f : share(top[h], sum[h], r->sinks, p->head[i]);
        UNROLL for (int n = 0; n < N_VALUES; ++n) {
            to[DIM_OF(n, 0)] = o[4 * n + 2 * h] * f;
            to[DIM_OF(n, 1)] = o[4 * n + 2 * h + 1] * f;
        }
        if (r->splits > 1 && t == 0) {
            to[HEAD_DIM_V] = top[h];
            to[HEAD_DIM_V + 1] = sum[h];
        }
    }
}

/* Add up n parts, each of four values and of a top and a sum: units of the largest top. */
typedef struct {
    float v[4], top, sum;
} Running;

INLINE void add_part(Running* x, const float* v, const float top, const float sum) {
    const float both = fmax(x->top, top), old = exp2_fast(x->top - both), new_ = exp2_fast(top - both);
    UNROLL for (int c = 0; c < 4; ++c) x->v[c] = x->v[c] * old + v[c] * new_;
    x->sum = x->sum * old + sum * new_;
    x->top = both;
}

/* Four values of pair i from d on: the result and, where asked for, its int8 form; or a part of it. */
INLINE void keep_quad(const Running* x, SHARED const Part* p, const Result* r, const int i, const int d,
                      const int there WARP_ARGS) {
    float v[4];
    const float f = there && r->splits == 1 ? share(x->top, x->sum, r->sinks, p->head[i]) : 1.0f;
    UNROLL for (int c = 0; c < 4; ++c) v[c] = x->v[c] * f;
    GLOBAL float* to = there ? place_of(p, r, i) : r->out;
    if (there) {
        UNROLL for (int c = 0; c < 4; ++c) to[d + c] = v[c];
        if (r->splits > 1 && d == 0) {
            to[HEAD_DIM_V] = x->top;
            to[HEAD_DIM_V + 1] = x->sum;
        }
    }
#if HEAD_DIM_V % 32 == 0
    if (r->splits == 1 && r->xq) keep_int8(v, (ulong)(to + d - r->out) / 4, there, r->xq, r->xd, r->xs WARP_PASS);
#endif
}

#define QUADS (HEAD_DIM_V / 4)
#define EACH_QUAD                                                                                     \
    for (int q0 = 0; q0 < p->n_pairs * QUADS; q0 += THREADS) {                      \
        const int i = (q0 + LOCAL_ID(0)) / QUADS, d = (q0 + LOCAL_ID(0)) % QUADS * 4;                 \
        const int there = q0 + LOCAL_ID(0) < p->n_pairs * QUADS && p->at[i] >= 0;                     \
        Running x = {{0.0f, 0.0f, 0.0f, 0.0f}, LOWEST, 0.0f};

#if KEY_WARPS > 1
/* The warps that share pairs i0 and i0 + 8 put their results into local memory, and all add them up. */
INLINE void meet(const float* o, const float* top, const float* sum, SHARED const Part* p, const Result* r, const int i0,
                 const int warp, SHARED float* room WARP_ARGS) {
    const int t = LOCAL_ID(0) % 4;
    UNROLL for (int h = 0; h < 2; ++h) {
        SHARED float* to = room + (warp * PAIRS + i0 + 8 * h) * PITCH + DIM_OF(0, 2 * t);
        UNROLL for (int n = 0; n < N_VALUES; ++n) {
            to[DIM_OF(n, 0)] = o[4 * n + 2 * h];
            to[DIM_OF(n, 1)] = o[4 * n + 2 * h + 1];
        }
        if (t == 0) to[HEAD_DIM_V] = top[h];
        if (t == 0) to[HEAD_DIM_V + 1] = sum[h];
    }
    BARRIER();
    EACH_QUAD
        for (int w = 0; w < KEY_WARPS && there; ++w) {
            SHARED const float* from = room + (w * PAIRS + i) * PITCH;
            float v[4];
            UNROLL for (int c = 0; c < 4; ++c) v[c] = from[d + c];
            add_part(&x, v, from[HEAD_DIM_V], from[HEAD_DIM_V + 1]);
        }
        keep_quad(&x, p, r, i, d, there WARP_PASS);
    }
}
#endif

/* Join the parts that the groups of all splits have written: BATCH loads at a time are on their way. */
#define BATCH 16
INLINE void join(SHARED const Part* p, const Result* r, const int splits WARP_ARGS) {
    EACH_QUAD
        GLOBAL const float* from = r->parts;
        if (there) from += (ulong)p->at[i] * splits * (HEAD_DIM_V + 4);
        for (int s0 = 0; s0 < splits && there; s0 += BATCH) {
            float v[4 * BATCH], sums[2 * BATCH];
            UNROLL for (int s = 0; s < BATCH; ++s) {
                GLOBAL const float* part = from + (s0 + s < splits ? s0 + s : s0) * (HEAD_DIM_V + 4);
                load4_fresh(v + 4 * s, part + d);
                load2_fresh(sums + 2 * s, part + HEAD_DIM_V);
            }
            UNROLL for (int s = 0; s < BATCH; ++s)
                if (s0 + s < splits) add_part(&x, v + 4 * s, sums[2 * s], sums[2 * s + 1]);
        }
        keep_quad(&x, p, r, i, d, there WARP_PASS);
    }
}

