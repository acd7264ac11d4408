/* What surrounds a library's half-precision matrix product: the activations as halves, and the result's scale.

   A row is scaled by a power of two so that its largest value is below 2^15, and cut into `terms` numbers of
   which each holds what the ones before lost: one term is as good as int8 activations, two terms of half or three
   of bfloat16 are as good as float. */
#define THREADS 128

INLINE ushort bf16_bits(const float x) {
    const uint b = FLOAT_BITS(x);
    return (ushort)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

/* Value i of the activations: of their int8 form where there is one (see unit_int8.h). With it a long prompt sees
   the same rounded activations as one token does, and a conversation does not depend on how it was cut. */
INLINE float activation(GLOBAL const float* x, GLOBAL const schar* xq, GLOBAL const float* xd, const ulong i) {
    return xq ? xd[i / 32] * (float)xq[i] : x[i];
}

/* Activations [T, n] -> y [terms, T, n], and scales [T] that the product must be multiplied with; a group a row. */
KERNEL void cut_rows(GLOBAL const float* x, GLOBAL const schar* xq, GLOBAL const float* xd, GLOBAL ushort* y,
                     GLOBAL float* scales, const int n, const int n_rows, const int terms, const int bf16) {
    LOCAL float part[THREADS];
    const int tid = LOCAL_ID(0), row = GROUP_ID(0);
    const ulong first = (ulong)row * (ulong)n;
    float top = 0.0f;
    for (int i = tid; i < n; i += THREADS) top = fmax(top, fabs(activation(x, xq, xd, first + i)));
    part[tid] = top;
    for (int o = THREADS / 2; o > 0; o >>= 1) {
        BARRIER();
        if (tid < o) part[tid] = fmax(part[tid], part[tid + o]);
    }
    BARRIER();
    const int exponent = (int)(FLOAT_BITS(part[0]) >> 23) - 127; /* of the largest value; -127 for a row of zeros */
    const int shift = exponent > 14 ? exponent - 14 : exponent < -8 && exponent > -100 ? exponent + 8 : 0;
    const float down = ldexp(1.0f, -shift);
    if (tid == 0) scales[row] = ldexp(1.0f, shift);
    for (int i = tid; i < n; i += THREADS) {
        float left = activation(x, xq, xd, first + i) * down;
        for (int term = 0; term < terms; ++term) {
            GLOBAL ushort* out = y + ((ulong)term * (ulong)n_rows + (ulong)row) * (ulong)n + i;
            if (bf16) {
                const ushort bits = bf16_bits(left);
                *out = bits;
                left -= BITS_FLOAT((uint)bits << 16);
            } else {
                half_store(out, left);
                left -= half_at(out);
            }
        }
    }
}

/* The sum of parts [terms, T, n] * scales [T] + bias [n] -> y, which may be the parts themselves. Then rows without a
   bias and with a scale of 1, as most are, are not touched. */
KERNEL void finish_rows(GLOBAL const float* parts, GLOBAL const float* scales, GLOBAL const float* bias, GLOBAL float* y,
                        const int terms, const int n, const int count) {
    const int i = GLOBAL_ID(0);
    if (i >= count) return;
    const float scale = scales ? scales[i / n] : 1.0f;
    if (terms == 1 && !bias && scale == 1.0f && parts == y) return;
    float sum = 0.0f;
    for (int term = terms - 1; term >= 0; --term) sum += parts[(ulong)term * (ulong)count + (ulong)i]; /* small first */
    y[i] = bias ? sum * scale + bias[i % n] : sum * scale;
}
