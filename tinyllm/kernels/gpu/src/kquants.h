/* K-quants: blocks of 256 weights, 8 units, whose groups of 16 or 32 have small integer scales. */

/* 32 bytes hold four units as pairs of bits, the first unit lowest. */
INLINE void pairs(GLOBAL const uchar* p, const int shift, Unit* u) {
    uint v[8];
    load32(p, v);
    UNROLL for (int i = 0; i < 8; ++i) u->q[i] = (int)((v[i] >> shift) & 0x03030303u);
}

/* planes: qs 64, scales 16, d 2, dmin 2; a byte of scales holds scale and minimum of 16 weights */
INLINE Unit unpack_q2_k(UNIT_ARGS) {
    Unit u;
    pairs(PLANE(0, 64) + 32 * (unit >> 2), 2 * (unit & 3), &u);
    GLOBAL const uchar* s = PLANE(64, 16) + 2 * unit;
    const float d = HALF(80), dmin = HALF(82);
    UNROLL for (int h = 0; h < 2; ++h) {
        u.d[h] = d * (float)(s[h] & 15);
        u.m[h] = -dmin * (float)(s[h] >> 4);
    }
    return u;
}

/* planes: qs 64, hmask 32, scales 12, d 2; weight = d (s - 32) (q - 4), hmask has the third bit of q */
INLINE Unit unpack_q3_k(UNIT_ARGS) {
    Unit u;
    uint high[8];
    pairs(PLANE(0, 64) + 32 * (unit >> 2), 2 * (unit & 3), &u);
    load32(PLANE(64, 32), high);
    UNROLL for (int i = 0; i < 8; ++i) u.q[i] |= (int)(((high[i] >> unit) & 0x01010101u) << 2);
    GLOBAL const uchar* s = PLANE(96, 12);
    const float d = HALF(108);
    UNROLL for (int h = 0; h < 2; ++h) {
        const int g = 2 * unit + h;
        const int low = (s[g & 7] >> (4 * (g >> 3))) & 15;
        const int scale = low | ((s[8 + (g & 3)] >> (2 * (g >> 2))) & 3) << 4;
        u.d[h] = d * (float)(scale - 32);
        u.m[h] = -4.0f * u.d[h];
    }
    return u;
}

/* 12 bytes: scale and minimum of eight groups, six bits each; see _scales_q4_k in gguf/quants/kquants.py. */
INLINE void scales_q4_k(GLOBAL const uint* s, const int g, const float d, const float dmin, Unit* u) {
    const int i = g & 3;
    const uint a = byte_of(s[0], i), b = byte_of(s[1], i), c = byte_of(s[2], i);
    const uint scale = g < 4 ? a & 63u : (c & 15u) | (a >> 6) << 4;
    const uint minimum = g < 4 ? b & 63u : c >> 4 | (b >> 6) << 4;
    scale_all(u, d * (float)scale, -dmin * (float)minimum);
}

/* 32 bytes hold two units, the first in the low nibbles. */
INLINE void half_bytes(GLOBAL const uchar* p, const int shift, Unit* u) {
    uint v[8];
    load32(p, v);
    UNROLL for (int i = 0; i < 8; ++i) u->q[i] = (int)((v[i] >> shift) & 0x0f0f0f0fu);
}

/* planes: qs 128, scales 12, d 2, dmin 2 */
INLINE Unit unpack_q4_k(UNIT_ARGS) {
    Unit u;
    half_bytes(PLANE(0, 128) + 32 * (unit >> 1), 4 * (unit & 1), &u);
    scales_q4_k(WORDS(128, 12), unit, HALF(140), HALF(142), &u);
    return u;
}

/* planes: qs 128, qh 32, scales 12, d 2, dmin 2 */
INLINE Unit unpack_q5_k(UNIT_ARGS) {
    Unit u;
    uint high[8];
    half_bytes(PLANE(0, 128) + 32 * (unit >> 1), 4 * (unit & 1), &u);
    load32(PLANE(128, 32), high);
    UNROLL for (int i = 0; i < 8; ++i) u.q[i] |= (int)(((high[i] >> unit) & 0x01010101u) << 4);
    scales_q4_k(WORDS(160, 12), unit, HALF(172), HALF(174), &u);
    return u;
}

/* planes: ql 128, qh 64, scales 16, d 2; weight = d s (q - 32) */
INLINE Unit unpack_q6_k(UNIT_ARGS) {
    Unit u;
    uint high[8];
    const int r = unit & 3;
    half_bytes(PLANE(0, 128) + 64 * (unit >> 2) + 32 * (r & 1), 4 * (r >> 1), &u);
    load32(PLANE(128, 64) + 32 * (unit >> 2), high);
    UNROLL for (int i = 0; i < 8; ++i) u.q[i] |= (int)(((high[i] >> (2 * r)) & 0x03030303u) << 4);
    GLOBAL const schar* s = (GLOBAL const schar*)PLANE(192, 16) + 2 * unit;
    const float d = HALF(208);
    UNROLL for (int h = 0; h < 2; ++h) {
        u.d[h] = d * (float)s[h];
        u.m[h] = -32.0f * u.d[h];
    }
    return u;
}

/* planes: qs 256, d 4; weight = d q */
INLINE Unit unpack_q8_k(UNIT_ARGS) {
    Unit u;
    load32(PLANE(0, 256) + 32 * unit, (uint*)u.q);
    scale_all(&u, BITS_FLOAT(*WORDS(256, 4)), 0.0f);
    return u;
}
