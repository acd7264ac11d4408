/* Kernels that go along the rows of an activation: norms, and its int8 form. */
#define THREADS 128

/* The sum over the group, in every thread. */
INLINE float group_sum(const float x, SHARED float* part) {
    const int i = LOCAL_ID(0);
    BARRIER();
    part[i] = x;
    for (int o = THREADS / 2; o > 0; o >>= 1) {
        BARRIER();
        if (i < o) part[i] += part[i + o];
    }
    BARRIER();
    return part[0];
}

/* (x - mean) / sqrt(variance + eps) * w + bias over runs of n values, mean taken as 0 unless `centre`.
   w has n_w values, n or a row's; the run of this group is number GROUP_ID(0). */
KERNEL void norm_runs(GLOBAL const float* x, GLOBAL const float* w, GLOBAL const float* bias, GLOBAL float* y, const int n,
                 const int n_w, const int n_bias, const int centre, const float eps) {
    LOCAL float part[THREADS];
    const ulong first = (ulong)GROUP_ID(0) * (ulong)n;
    const int within_w = n_w ? (int)(first % (ulong)n_w) : 0, within_b = n_bias ? (int)(first % (ulong)n_bias) : 0;
    float sum = 0.0f, mean = 0.0f;
    if (centre) {
        for (int i = LOCAL_ID(0); i < n; i += THREADS) sum += x[first + i];
        mean = group_sum(sum, part) / (float)n;
        sum = 0.0f;
    }
    for (int i = LOCAL_ID(0); i < n; i += THREADS) sum += (x[first + i] - mean) * (x[first + i] - mean);
    const float scale = 1.0f / sqrt(group_sum(sum, part) / (float)n + eps);
    for (int i = LOCAL_ID(0); i < n; i += THREADS) {
        float v = (x[first + i] - mean) * scale;
        if (n_w) v *= w[within_w + i];
        if (n_bias) v += bias[within_b + i];
        y[first + i] = v;
    }
}

/* int8 form of n_values in runs of 32: codes, scale, and scale times the sums of 16 codes (see unit_int8.h).
   Each thread has four values, eight threads a run. */
KERNEL void quantise(GLOBAL const float* x, GLOBAL int* xq, GLOBAL float* xd, GLOBAL float* xs, const int n_quads) {
    LOCAL float peak[THREADS];
    LOCAL int sums[THREADS];
    const int tid = LOCAL_ID(0), i = GLOBAL_ID(0), run = tid & ~7;
    float v[4], top = 0.0f;
    UNROLL for (int j = 0; j < 4; ++j) {
        v[j] = i < n_quads ? x[4 * (ulong)i + j] : 0.0f;
        top = fmax(top, fabs(v[j]));
    }
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
    if (i >= n_quads) return;
    xq[i] = (int)packed;
    if ((tid & 3) == 0) {
        xs[i / 4] = d * (float)(sums[tid] + sums[tid + 1] + sums[tid + 2] + sums[tid + 3]);
        if (tid == run) xd[i / 8] = d;
    }
}
