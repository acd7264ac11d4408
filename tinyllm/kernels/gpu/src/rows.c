/* Kernels that go along the rows of an activation: norms, and the int8 form that quantised matrices multiply with. */
#define THREADS 128 /* of the kernels that quantise */
#define MOST_THREADS 512 /* of a norm: a power of two, chosen by the host */
#define QUADS 4 /* that each thread of norm_rows keeps in registers */

/* int8 form of four values in each thread, eight threads a run of 32: codes, scale, and scale times the sums of 16
   codes (see unit_int8.h). i counts quads of the array; `there` is false for threads beyond its end. */
INLINE void quantise_quad(const float* v, const ulong i, const int there, GLOBAL int* xq, GLOBAL float* xd,
                          GLOBAL float* xs, SHARED float* part) {
    const int tid = LOCAL_ID(0);
    float top = 0.0f, sum = 0.0f;
    UNROLL for (int j = 0; j < 4; ++j) top = fmax(top, fabs(v[j]));
    UNROLL for (int o = 1; o < 8; o <<= 1) top = fmax(top, lane_xor(top, o, part));
    const float inverse = top > 0.0f ? 127.0f / top : 0.0f, d = top / 127.0f;
    uint packed = 0;
    UNROLL for (int j = 0; j < 4; ++j) {
        const float q = rint(v[j] * inverse);
        packed |= ((uint)(int)q & 255u) << (8 * j);
        sum += q;
    }
    UNROLL for (int o = 1; o < 4; o <<= 1) sum += lane_xor(sum, o, part);
    if (there) {
        xq[i] = (int)packed;
        if ((tid & 3) == 0) xs[i / 4] = d * sum;
        if ((tid & 7) == 0) xd[i / 8] = d;
    }
}

INLINE void load_quad(GLOBAL const float* x, const ulong i, float* v) {
    const float4 quad = *((GLOBAL const float4*)x + i);
    v[0] = quad.x;
    v[1] = quad.y;
    v[2] = quad.z;
    v[3] = quad.w;
}

INLINE void store_quad(GLOBAL float* y, const ulong i, const float* v) {
    float4 quad;
    quad.x = v[0];
    quad.y = v[1];
    quad.z = v[2];
    quad.w = v[3];
    *((GLOBAL float4*)y + i) = quad;
}

/* n_quads fours of x. */
KERNEL void quantise(GLOBAL const float* x, GLOBAL int* xq, GLOBAL float* xd, GLOBAL float* xs, const int n_quads) {
    LOCAL float part[THREADS];
    const int i = GLOBAL_ID(0);
    float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (i < n_quads) load_quad(x, (ulong)i, v);
    quantise_quad(v, (ulong)i, i < n_quads, xq, xd, xs, part);
}

/* act(gate) * up, or act(gate) without up, in both forms. */
KERNEL void act_mul_int8(GLOBAL const float* gate, GLOBAL const float* up, GLOBAL float* y, GLOBAL int* xq,
                         GLOBAL float* xd, GLOBAL float* xs, const int kind, const int n_quads) {
    LOCAL float part[THREADS];
    const int i = GLOBAL_ID(0);
    float v[4] = {0.0f, 0.0f, 0.0f, 0.0f}, u[4];
    if (i < n_quads) {
        load_quad(gate, (ulong)i, v);
        if (up) load_quad(up, (ulong)i, u);
        UNROLL for (int j = 0; j < 4; ++j) v[j] = up ? gated(v[j], u[j], kind) : activate(v[j], kind);
        store_quad(y, (ulong)i, v);
    }
    quantise_quad(v, (ulong)i, i < n_quads, xq, xd, xs, part);
}

#define NORM_ARGS                                                                                                  \
    GLOBAL const float *x, GLOBAL const float *b, GLOBAL float *sum, GLOBAL const float *w, GLOBAL const float *bias, \
        GLOBAL float *y, GLOBAL int *xq, GLOBAL float *xd, GLOBAL float *xs, const int n, const int n_w,              \
        const int n_bias, const int n_quads, const int centre, const float eps, const float scale

/* (x - mean) / sqrt(variance + eps) * w + bias over runs of n values, mean taken as 0 unless `centre`; a group each.

   w has n_w values, n or a row's (0: no w), bias n_bias. With b, x + scale * b goes to `sum` and takes x's place.
   With n_quads = n / 4 the int8 form is made, too; otherwise n_quads is 0.

   n is a multiple of 4, and the group has enough threads to keep a run in registers: so memory is waited for once. */
INLINE void norm_row(const int centred, NORM_ARGS, SHARED float* part) {
    const int tid = LOCAL_ID(0), threads = LOCAL_SIZE(0), quads = n / 4;
    const ulong first = (ulong)GROUP_ID(0) * (ulong)quads;
    const int within_w = n_w ? (int)(first % (ulong)(n_w / 4)) : 0;
    const int within_b = n_bias ? (int)(first % (ulong)(n_bias / 4)) : 0;
    float v[4 * QUADS], weight[4 * QUADS], more[4], total = 0.0f;
    UNROLL for (int j = 0; j < QUADS; ++j) {
        const int i = tid + j * threads;
        UNROLL for (int c = 0; c < 4; ++c) v[4 * j + c] = 0.0f, weight[4 * j + c] = 1.0f;
        if (i >= quads) continue;
        load_quad(x, first + (ulong)i, v + 4 * j);
        if (n_w) load_quad(w, (ulong)(within_w + i), weight + 4 * j);
        if (b) {
            load_quad(b, first + (ulong)i, more);
            UNROLL for (int c = 0; c < 4; ++c) v[4 * j + c] += scale * more[c];
            store_quad(sum, first + (ulong)i, v + 4 * j);
        }
    }
    float mean = 0.0f;
    if (centred) { /* a constant where this is inlined */
        UNROLL for (int j = 0; j < 4 * QUADS; ++j) total += v[j];
        mean = group_sum(total, part) / (float)n;
    }
    total = 0.0f;
    UNROLL for (int j = 0; j < QUADS; ++j)
        if (tid + j * threads < quads)
            UNROLL for (int c = 0; c < 4; ++c) total += (v[4 * j + c] - mean) * (v[4 * j + c] - mean);
    const float shrink = 1.0f / sqrt(group_sum(total, part) / (float)n + eps);
    UNROLL for (int j = 0; j < QUADS; ++j) {
        const int i = tid + j * threads;
        UNROLL for (int c = 0; c < 4; ++c) v[4 * j + c] = (v[4 * j + c] - mean) * shrink * weight[4 * j + c];
        if (i >= quads) continue;
        if (n_bias) {
            load_quad(bias, (ulong)(within_b + i), more);
            UNROLL for (int c = 0; c < 4; ++c) v[4 * j + c] += more[c];
        }
        store_quad(y, first + (ulong)i, v + 4 * j);
    }
    UNROLL for (int j = 0; j < QUADS && j * threads < n_quads; ++j) {
        const int i = tid + j * threads;
        quantise_quad(v + 4 * j, first + (ulong)i, i < quads, xq, xd, xs, part);
    }
}

#define NORM_ROWS(name, centred)                                                                                  \
    KERNEL void name(NORM_ARGS) {                                                                                 \
        LOCAL float part[MOST_THREADS + 32];                                                                      \
        norm_row(centred, x, b, sum, w, bias, y, xq, xd, xs, n, n_w, n_bias, n_quads, centre, eps, scale, part);   \
    }
NORM_ROWS(norm_rows, 0)
NORM_ROWS(norm_rows_centred, 1)

/* The same for any n; without the int8 form. */
KERNEL void norm_runs(NORM_ARGS) {
    LOCAL float part[MOST_THREADS + 32];
    const int tid = LOCAL_ID(0), threads = LOCAL_SIZE(0);
    const ulong first = (ulong)GROUP_ID(0) * (ulong)n;
    const int within_w = n_w ? (int)(first % (ulong)n_w) : 0, within_b = n_bias ? (int)(first % (ulong)n_bias) : 0;
    GLOBAL const float* in = b ? sum + first : x + first;
    float total = 0.0f;
    for (int i = tid; i < n; i += threads) {
        const float v = b ? x[first + i] + scale * b[first + i] : x[first + i];
        if (b) sum[first + i] = v; /* read again below by this same thread */
        total += v;
    }
    const float mean = group_sum(total, part) / (float)n * (float)centre;
    total = 0.0f;
    for (int i = tid; i < n; i += threads) total += (in[i] - mean) * (in[i] - mean);
    const float shrink = 1.0f / sqrt(group_sum(total, part) / (float)n + eps);
    for (int i = tid; i < n; i += threads) {
        float v = (in[i] - mean) * shrink;
        if (n_w) v *= w[within_w + i];
        if (n_bias) v += bias[within_b + i];
        y[first + i] = v;
    }
}
