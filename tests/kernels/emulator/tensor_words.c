/* The words of tensor.h, one warp: c = a b with a [16, 16], b [16, 8] given both ways, and other lanes' values. */
KERNEL void words(GLOBAL const ushort* a, GLOBAL const ushort* b, GLOBAL float* c, GLOBAL float* c_transposed,
                  GLOBAL float* crossed) {
    WARP_ROOM(1)
    LOCAL ushort as[16 * 24];
    LOCAL ushort bs[16 * 24]; /* column by column */
    LOCAL ushort bt[16 * 24]; /* row by row */
    const int lane = LOCAL_ID(0);
    for (int i = lane; i < 256; i += 32) as[i / 16 * 24 + i % 16] = a[i];
    for (int i = lane; i < 128; i += 32) {
        bt[i / 8 * 24 + i % 8] = b[i];
        bs[i % 8 * 24 + i / 8] = b[i];
    }
    for (int i = lane; i < 128; i += 32) bs[(8 + i % 8) * 24 + i / 8] = bt[i / 8 * 24 + 8 + i % 8] = 0;
    BARRIER();
    uint x[4], y[4], z[4];
    float sums[4], others[4];
    load_tiles(x, as + lane % 16 * 24 + lane / 16 * 8);
    load_tiles(y, bs + (lane % 8 + lane / 16 * 8) * 24 + lane / 8 % 2 * 8);
    load_tiles_transposed(z, bt + lane % 16 * 24 + lane / 16 * 8);
    for (int i = 0; i < 4; ++i) sums[i] = others[i] = 1.0f;
    mma(sums, x, y);
    mma(others, x, z);
    for (int i = 0; i < 4; ++i) {
        const int at = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
        c[at] = sums[i];
        c_transposed[at] = others[i];
    }
    crossed[lane] = lane_xor((float)lane, 5);
}

/* The half words: (a, b, c) pairs -> a b + c, a + b, and two floats as a pair. */
KERNEL void halves(GLOBAL const uint* a, GLOBAL const uint* b, GLOBAL const uint* c, GLOBAL const float* x,
                   GLOBAL uint* products, GLOBAL uint* added, GLOBAL uint* pairs) {
    const int i = LOCAL_ID(0);
    products[i] = half2_fma(a[i], b[i], c[i]);
    added[i] = half2_add(a[i], b[i]);
    pairs[i] = half2_of(x[2 * i], x[2 * i + 1]);
}
