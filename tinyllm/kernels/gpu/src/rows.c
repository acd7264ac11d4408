/* Kernels that go along the rows of an activation: norms, and the int8 form that quantised matrices multiply with. */
#define THREADS 128 /* of the kernels that quantise */
#define MOST_THREADS 512 /* of a norm: a power of two, chosen by the host */

/* The sum over the group, in every thread. */
INLINE float group_sum(const float x, SHARED float* part) {
    const int i = LOCAL_ID(0);
    BARRIER();
    part[i] = x;
    for (int o = LOCAL_SIZE(0) / 2; o > 0; o >>= 1) {
        BARRIER();
        if (i < o) part[i] += part[i + o];
    }
    BARRIER();
    return part[0];
}

/* int8 form of four values in each thread, eight threads a run of 32: codes, scale, and scale times the sums of 16
   codes (see unit_int8.h). i counts quads of the array; `there` is false for threads beyond its end. */
INLINE void quantise_quad(const float* v, const ulong i, const int there, GLOBAL int* xq, GLOBAL float* xd,
                          GLOBAL float* xs, SHARED float* peak, SHARED int* sums) {
    const int tid = LOCAL_ID(0), run = tid & ~7;
    float top = 0.0f;
    UNROLL for (int j = 0; j < 4; ++j) top = fmax(top, fabs(v[j]));
    peak[tid] = top;
    BARRIER();
    UNROLL for (int j = 0; j < 8; ++j) top = fmax(top, peak[run + j]);
    const float inverse = top > 0.0f ? 127.0f / top : 0.0f, d = top / 127.0f;
    uint packed = 0;
    int sum = 0;
    UNROLL for (int j = 0; j < 4; ++j) {
        const int q = (int)rint(v[j] * inverse);
        packed |= ((uint)q & 255u) << (8 * j);
        sum += q;
    }
    sums[tid] = sum;
    BARRIER();
    if (there) {
        xq[i] = (int)packed;
        if ((tid & 3) == 0) xs[i / 4] = d * (float)(sums[tid] + sums[tid + 1] + sums[tid + 2] + sums[tid + 3]);
        if (tid == run) xd[i / 8] = d;
    }
}

/* n_quads fours of x. */
KERNEL void quantise(GLOBAL const float* x, GLOBAL int* xq, GLOBAL float* xd, GLOBAL float* xs, const int n_quads) {
    LOCAL float peak[THREADS];
    LOCAL int sums[THREADS];
    const int i = GLOBAL_ID(0);
    float v[4];
    UNROLL for (int j = 0; j < 4; ++j) v[j] = i < n_quads ? x[4 * (ulong)i + j] : 0.0f;
    quantise_quad(v, (ulong)i, i < n_quads, xq, xd, xs, peak, sums);
}

/* act(gate) * up in both forms. */
KERNEL void act_mul_int8(GLOBAL const float* gate, GLOBAL const float* up, GLOBAL float* y, GLOBAL int* xq,
                         GLOBAL float* xd, GLOBAL float* xs, const int kind, const int n_quads) {
    LOCAL float peak[THREADS];
    LOCAL int sums[THREADS];
    const int i = GLOBAL_ID(0);
    float v[4];
    UNROLL for (int j = 0; j < 4; ++j) {
        const ulong at = 4 * (ulong)i + j;
        v[j] = i < n_quads ? gated(gate[at], up[at], kind) : 0.0f;
        if (i < n_quads) y[at] = v[j];
    }
    quantise_quad(v, (ulong)i, i < n_quads, xq, xd, xs, peak, sums);
}

/* (x - mean) / sqrt(variance + eps) * w + bias over runs of n values, mean taken as 0 unless `centre`.

   w has n_w values, n or a row's (0: no w), bias n_bias. With b, x + scale * b goes to `sum` and takes x's place.
   With n_quads = n / 4 the int8 form is made, too; otherwise n_quads is 0. A group for each run. */
KERNEL void norm_runs(GLOBAL const float* x, GLOBAL const float* b, GLOBAL float* sum, GLOBAL const float* w,
                      GLOBAL const float* bias, GLOBAL float* y, GLOBAL int* xq, GLOBAL float* xd, GLOBAL float* xs,
                      const int n, const int n_w, const int n_bias, const int n_quads, const int centre,
                      const float eps, const float scale) {
    LOCAL float part[MOST_THREADS];
    LOCAL int sums[MOST_THREADS];
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
    BARRIER_GLOBAL();
    for (int q0 = 0; q0 < n_quads; q0 += threads) {
        const int i = q0 + tid;
        float v[4];
        UNROLL for (int j = 0; j < 4; ++j) v[j] = i < n_quads ? y[first + 4 * i + j] : 0.0f;
        quantise_quad(v, first / 4 + (ulong)i, i < n_quads, xq, xd, xs, part, sums);
        BARRIER();
    }
}
