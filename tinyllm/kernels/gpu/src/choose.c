/* The k largest of each row of many logits: a bound that k of them reach and few more do, and all that reach it. The
   k-th largest of the columns' maxima is such a bound. The host sorts those few. */
#define COLUMNS 4096
#define THREADS 256
#define EACH (COLUMNS / THREADS)
#define BROKEN 0xffffffffu

/* Larger floats have larger keys, both zeros the same; NaN and infinity have the largest. */
INLINE uint key_of(const float x) {
    const uint b = FLOAT_BITS(x);
    if ((b & 0x7f800000u) == 0x7f800000u) return BROKEN;
    return b & 0x80000000u ? (b == 0x80000000u ? b : ~b) : b | 0x80000000u;
}

/* maxima [rows][COLUMNS] of x [rows][n]: the largest key among values COLUMNS apart; 0 where there are none. */
KERNEL void column_maxima(GLOBAL const float* x, GLOBAL uint* maxima, const int n) {
    const int column = GLOBAL_ID(0), row = GROUP_ID(1);
    GLOBAL const float* values = x + (ulong)row * n;
    uint largest = 0;
    UNROLL
    for (int i = column; i < n; i += COLUMNS) {
        const uint key = key_of(values[i]);
        largest = key > largest ? key : largest;
    }
    maxima[(ulong)row * COLUMNS + column] = largest;
}

/* bounds [rows]: the k-th largest of each row's maxima, digit by digit. found [2][rows]: 0, which collect counts up,
   and whether the row has a value that is not finite. */
KERNEL void kth_maximum(GLOBAL const uint* maxima, GLOBAL uint* bounds, GLOBAL int* found, const int k,
                        const int rows) {
    LOCAL int bins[THREADS];
    LOCAL int digit, above, broken;
    const int tid = LOCAL_ID(0), row = GROUP_ID(0);
    uint mine[EACH], bound = 0;
    int left = k;
    if (tid == 0) broken = 0;
    BARRIER();
    UNROLL
    for (int j = 0; j < EACH; ++j) {
        mine[j] = maxima[(ulong)row * COLUMNS + j * THREADS + tid];
        if (mine[j] == BROKEN) broken = 1;
    }
    for (int shift = 24; shift >= 0; shift -= 8) {
        bins[tid] = 0;
        BARRIER();
        UNROLL
        for (int j = 0; j < EACH; ++j)
            if ((mine[j] ^ bound) >> shift < THREADS) ATOMIC_ADD(bins + ((mine[j] >> shift) & (THREADS - 1)), 1);
        BARRIER();
        for (int step = 1; step < THREADS; step *= 2) { /* bins[t] becomes the sum of those from t on */
            const int more = tid + step < THREADS ? bins[tid + step] : 0;
            BARRIER();
            bins[tid] += more;
            BARRIER();
        }
        const int higher = tid + 1 < THREADS ? bins[tid + 1] : 0;
        if (bins[tid] >= left && higher < left) {
            digit = tid;
            above = higher;
        }
        BARRIER();
        bound |= (uint)digit << shift;
        left -= above;
        BARRIER();
    }
    if (tid > 0) return;
    bounds[row] = bound;
    found[row] = 0;
    found[rows + row] = broken;
}

/* found [2 + 2 * room][rows]: how many reach the bound, the above, then of each its id and its key. */
KERNEL void collect(GLOBAL const float* x, GLOBAL const uint* bounds, GLOBAL int* found, const int n, const int room,
                    const int rows) {
    const int i = GLOBAL_ID(0), row = GROUP_ID(1);
    if (i >= n) return;
    const uint key = key_of(x[(ulong)row * n + i]);
    if (key < bounds[row]) return;
    const int at = ATOMIC_ADD(found + row, 1);
    if (at >= room) return;
    found[(2 + 2 * at) * rows + row] = i;
    found[(3 + 2 * at) * rows + row] = (int)key;
}
