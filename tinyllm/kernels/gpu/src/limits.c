/* What the device can do, and no more: read memory, multiply bytes, multiply floats. */
#define CHAINS 8 /* sums under way in a thread */

/* The bits of n fours of words, by all threads. */
KERNEL void read_memory(GLOBAL const uint4* x, GLOBAL uint* out, const int n) {
    uint4 sum = x[0];
    const int threads = LOCAL_SIZE(0) * 2048;
    for (int i = GLOBAL_ID(0); i < n; i += threads) {
        const uint4 v = x[i];
        sum.x ^= v.x, sum.y ^= v.y, sum.z ^= v.z, sum.w ^= v.w;
    }
    out[GLOBAL_ID(0)] = sum.x ^ sum.y ^ sum.z ^ sum.w;
}

KERNEL void byte_dots(GLOBAL int* out, const int n) {
    const int v = out[GLOBAL_ID(0)];
    int sums[CHAINS];
    UNROLL for (int c = 0; c < CHAINS; ++c) sums[c] = v + c;
    for (int i = 0; i < n; ++i) {
        UNROLL for (int c = 0; c < CHAINS; ++c) sums[c] = dot4(sums[c], v, sums[c]);
    }
    int sum = 0;
    UNROLL for (int c = 0; c < CHAINS; ++c) sum += sums[c];
    out[GLOBAL_ID(0)] = sum;
}

KERNEL void float_adds(GLOBAL float* out, const int n) {
    const float v = out[GLOBAL_ID(0)];
    float sums[CHAINS];
    UNROLL for (int c = 0; c < CHAINS; ++c) sums[c] = v + (float)c;
    for (int i = 0; i < n; ++i) {
        UNROLL for (int c = 0; c < CHAINS; ++c) sums[c] = sums[c] * v + v;
    }
    float sum = 0.0f;
    UNROLL for (int c = 0; c < CHAINS; ++c) sum += sums[c];
    out[GLOBAL_ID(0)] = sum;
}
