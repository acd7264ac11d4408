/* Sums over a group. */

/* The sum over the group, in every thread. LOCAL_SIZE(0) is a multiple of 32, at most 1024; `part` has room for that
   many values and 32. */
INLINE float group_sum(float x, SHARED float* part) {
    SHARED float* warps = part + LOCAL_SIZE(0);
    for (int o = 16; o > 0; o >>= 1) x += lane_xor(x, o, part);
    if (LOCAL_SIZE(0) == 32) return x;
    BARRIER();
    if (LOCAL_ID(0) % 32 == 0) warps[LOCAL_ID(0) / 32] = x;
    BARRIER();
    float sum = 0.0f;
    for (int i = 0; i < LOCAL_SIZE(0) / 32; ++i) sum += warps[i];
    return sum;
}
