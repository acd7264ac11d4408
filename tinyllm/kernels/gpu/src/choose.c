/* The k largest of many logits, in two passes: a histogram of the upper bits of an order-preserving key, and the
   values in or above the bin that holds the k-th. The host sorts those few. */
#define BINS 4096
#define THREADS 256

/* Larger floats have larger keys. */
INLINE uint key_of(const float x) {
    const uint b = FLOAT_BITS(x);
    return b & 0x80000000u ? ~b : b | 0x80000000u;
}

/* bins [BINS + 2] are 0 at first; the last two count values found (by the second pass) and NaNs. */
KERNEL void histogram(GLOBAL const float* x, GLOBAL int* bins, const int n) {
    const int i = GLOBAL_ID(0);
    if (i >= n) return;
    if (x[i] != x[i]) ATOMIC_ADD(bins + BINS + 1, 1);
    ATOMIC_ADD(bins + (key_of(x[i]) >> 20), 1);
}

/* found [room][2]: id, and the bits of the value; every group looks for the bin itself. */
KERNEL void collect(GLOBAL const float* x, GLOBAL int* bins, GLOBAL uint* found, const int k, const int room,
                    const int n) {
    LOCAL int part[THREADS];
    LOCAL int lowest;
    const int tid = LOCAL_ID(0), i = GLOBAL_ID(0), per = BINS / THREADS;
    int sum = 0;
    for (int b = 0; b < per; ++b) sum += bins[BINS - 1 - tid * per - b];
    part[tid] = sum;
    BARRIER();
    if (tid == 0) {
        int above = 0, t = 0, bin;
        while (t < THREADS - 1 && above + part[t] < k) above += part[t++];
        for (bin = BINS - 1 - t * per; bin > 0 && above + bins[bin] < k; --bin) above += bins[bin];
        lowest = bin;
    }
    BARRIER();
    if (i >= n || (int)(key_of(x[i]) >> 20) < lowest) return;
    const int at = ATOMIC_ADD(bins + BINS, 1);
    if (at >= room) return;
    found[2 * at] = (uint)i;
    found[2 * at + 1] = FLOAT_BITS(x[i]);
}
