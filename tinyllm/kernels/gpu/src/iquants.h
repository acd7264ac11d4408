/* I-quants: runs of 8 (IQ1, IQ2) or 4 (IQ3) weights are rows of a codebook, passed in `grid` as packed bytes. */

/* Four positive bytes, negated where a bit of `signs` is set. */
INLINE int signed4(const uint magnitudes, const uint signs) {
    const uint minus = spread(signs) * 255u;
    return (int)((magnitudes ^ minus) + (minus & 0x01010101u));
}

/* Seven sign bits and an eighth that makes the number of ones even. */
INLINE uint even_signs(const uint seven) {
    return seven | (uint)(POPCOUNT(seven) & 1) << 7;
}

/* Run k of a unit: a row of eight. */
INLINE void signed_row8(Unit* u, const int k, GLOBAL const uint* grid, const uint index, const uint signs) {
    u->q[2 * k] = signed4(grid[2 * index], signs);
    u->q[2 * k + 1] = signed4(grid[2 * index + 1], signs >> 4);
}

INLINE void scale_halves(Unit* u, const float d, const uint s) {
    u->d[0] = d * (float)(2 * (s & 15u) + 1);
    u->d[1] = d * (float)(2 * (s >> 4) + 1);
    u->m[0] = u->m[1] = 0.0f;
}

/* planes: qs 64 (a word of four indices and a word of signs and scale for each unit), d 2 */
INLINE Unit unpack_iq2_xxs(UNIT_ARGS) {
    Unit u;
    const uint index = WORDS(0, 64)[2 * unit], signs = WORDS(0, 64)[2 * unit + 1];
    UNROLL for (int k = 0; k < 4; ++k)
        signed_row8(&u, k, grid, byte_of(index, k), even_signs((signs >> (7 * k)) & 127u));
    scale_all(&u, HALF(64) * 0.125f * (float)(2 * (signs >> 28) + 1), 0.0f);
    return u;
}

/* planes: qs 64 (index in nine bits, signs in seven), scales 8, d 2 */
INLINE Unit unpack_iq2_xs(UNIT_ARGS) {
    Unit u;
    GLOBAL const ushort* qs = (GLOBAL const ushort*)PLANE(0, 64) + 4 * unit;
    UNROLL for (int k = 0; k < 4; ++k) signed_row8(&u, k, grid, qs[k] & 511u, even_signs(qs[k] >> 9));
    scale_halves(&u, HALF(72) * 0.125f, PLANE(64, 8)[unit]);
    return u;
}

/* planes: qs 32, signs 32, qh 8, scales 8, d 2 */
INLINE Unit unpack_iq2_s(UNIT_ARGS) {
    Unit u;
    const uint qs = WORDS(0, 32)[unit], signs = WORDS(32, 32)[unit], qh = PLANE(64, 8)[unit];
    UNROLL for (int k = 0; k < 4; ++k)
        signed_row8(&u, k, grid, byte_of(qs, k) | ((qh >> (2 * k)) & 3u) << 8, byte_of(signs, k));
    scale_halves(&u, HALF(80) * 0.125f, PLANE(72, 8)[unit]);
    return u;
}

/* planes: qs 64, signs 32 (with the scale on top), d 2; rows of four */
INLINE Unit unpack_iq3_xxs(UNIT_ARGS) {
    Unit u;
    GLOBAL const uchar* qs = PLANE(0, 64) + 8 * unit;
    const uint word = WORDS(64, 32)[unit];
    UNROLL for (int k = 0; k < 4; ++k) {
        const uint signs = even_signs((word >> (7 * k)) & 127u);
        u.q[2 * k] = signed4(grid[qs[2 * k]], signs);
        u.q[2 * k + 1] = signed4(grid[qs[2 * k + 1]], signs >> 4);
    }
    scale_all(&u, HALF(96) * 0.25f * (float)(2 * (word >> 28) + 1), 0.0f);
    return u;
}

/* planes: qs 64, signs 32, qh 8, scales 4, d 2; rows of four, nine-bit indices */
INLINE Unit unpack_iq3_s(UNIT_ARGS) {
    Unit u;
    GLOBAL const uchar* qs = PLANE(0, 64) + 8 * unit;
    const uint signs = WORDS(64, 32)[unit], qh = PLANE(96, 8)[unit];
    UNROLL for (int k = 0; k < 8; ++k)
        u.q[k] = signed4(grid[qs[k] | ((qh >> k) & 1u) << 8], signs >> (4 * k));
    const uint s = (PLANE(104, 4)[unit >> 1] >> (4 * (unit & 1))) & 15u;
    scale_all(&u, HALF(108) * (float)(2 * s + 1), 0.0f);
    return u;
}

/* Eight times four codes of -1, 0, 1, plus or minus one. */
INLINE int shifted4(const uint codes, const uint minus) {
    const uint x = (codes << 3) & 0xf8f8f8f8u;
    return (int)(minus ? ((x | 0x80808080u) - 0x01010101u) ^ (~x & 0x80808080u) : x | 0x01010101u);
}

INLINE void shifted_row8(Unit* u, const int k, GLOBAL const uint* grid, const uint index, const uint minus) {
    u->q[2 * k] = shifted4(grid[2 * index], minus);
    u->q[2 * k + 1] = shifted4(grid[2 * index + 1], minus);
}

/* planes: qs 32, qh 16 (four times three index bits, three bits of scale, the minus), d 2 */
INLINE Unit unpack_iq1_s(UNIT_ARGS) {
    Unit u;
    const uint qs = WORDS(0, 32)[unit], qh = ((GLOBAL const ushort*)PLANE(32, 16))[unit];
    UNROLL for (int k = 0; k < 4; ++k)
        shifted_row8(&u, k, grid, byte_of(qs, k) | ((qh >> (3 * k)) & 7u) << 8, qh >> 15);
    scale_all(&u, HALF(48) * 0.125f * (float)(2 * ((qh >> 12) & 7u) + 1), 0.0f);
    return u;
}

/* planes: qs 32, qh 16 (a nibble for each run: three index bits, the minus), scales 8 (with d on top) */
INLINE Unit unpack_iq1_m(UNIT_ARGS) {
    Unit u;
    const uint qs = WORDS(0, 32)[unit], qh = ((GLOBAL const ushort*)PLANE(32, 16))[unit];
    UNROLL for (int k = 0; k < 4; ++k) {
        const uint n = (qh >> (4 * k)) & 15u;
        shifted_row8(&u, k, grid, byte_of(qs, k) | (n & 7u) << 8, n >> 3);
    }
    const uint lo = WORDS(48, 8)[0], hi = WORDS(48, 8)[1];
    const uint bits = ((lo >> 12) & 15u) | ((lo >> 28) << 4) | (((hi >> 12) & 15u) << 8) | ((hi >> 28) << 12);
    const uint scales = ((unit & 4 ? hi : lo) >> (16 * ((unit >> 1) & 1))) >> (6 * (unit & 1));
    const float d = half_bits(bits) * 0.125f;
    u.d[0] = d * (float)(2 * (scales & 7u) + 1);
    u.d[1] = d * (float)(2 * ((scales >> 3) & 7u) + 1);
    u.m[0] = u.m[1] = 0.0f;
    return u;
}

/* 16 bytes of nibbles; the 16 uneven steps of IQ4 are -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113. */
INLINE void uneven_steps(GLOBAL const uchar* p, Unit* u) {
    uint v[4];
    load16(p, v);
    UNROLL for (int i = 0; i < 4; ++i)
        lookup16(v[i], 0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u, u->q + i, u->q + 4 + i);
}

/* planes: qs 16, d 2 */
INLINE Unit unpack_iq4_nl(UNIT_ARGS) {
    Unit u;
    uneven_steps(PLANE(0, 16), &u);
    scale_all(&u, HALF(16), 0.0f);
    return u;
}

/* planes: qs 128, scales_l 4, scales_h 2, d 2; weight = d (s - 32) steps[q], six bits of s for a unit */
INLINE Unit unpack_iq4_xs(UNIT_ARGS) {
    Unit u;
    uneven_steps(PLANE(0, 128) + 16 * unit, &u);
    const uint low = (PLANE(128, 4)[unit >> 1] >> (4 * (unit & 1))) & 15u;
    const uint high = (*(GLOBAL const ushort*)PLANE(132, 2) >> (2 * unit)) & 3u;
    scale_all(&u, HALF(134) * (float)((int)(low | high << 4) - 32), 0.0f);
    return u;
}
