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

/* 16 bytes: d, dmin, and 12 with scale and minimum of eight groups, six bits each; see _scales_q4_k in
   gguf/quants/kquants.py. */
INLINE void scales_q4_k(GLOBAL const uchar* p, const int g, Unit* u) {
    uint v[4];
    load16(p, v);
    const uint* s = v + 1;
    const float d = half_bits(v[0] & 0xffffu), dmin = half_bits(v[0] >> 16);
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

/* planes: qs 128, scales 16 (with d and dmin before them) */
INLINE Unit unpack_q4_k(UNIT_ARGS) {
    Unit u;
    half_bytes(PLANE(0, 128) + 32 * (unit >> 1), 4 * (unit & 1), &u);
    scales_q4_k(PLANE(128, 16), unit, &u);
    return u;
}

/* planes: qs 128, qh 32, scales 16 (with d and dmin before them) */
INLINE Unit unpack_q5_k(UNIT_ARGS) {
    Unit u;
    uint high[8];
    half_bytes(PLANE(0, 128) + 32 * (unit >> 1), 4 * (unit & 1), &u);
    load32(PLANE(128, 32), high);
    UNROLL for (int i = 0; i < 8; ++i) u.q[i] |= (int)(((high[i] >> unit) & 0x01010101u) << 4);
    scales_q4_k(PLANE(160, 16), unit, &u);
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

/* ---- pieces: of each block eight, whose two runs come from the same 16 bytes; of Q8_K 16 of one run */

#define FIELD(before, size, i) BYTES(before, size, block * (size) + (uint)(i))

/* Pairs of bits from `shift` on to the first run, those above them to the other. */
INLINE void pair_runs(GLOBAL const uchar* p, const uint shift, Unit* u) {
    uint v[4];
    load16(p, v);
    UNROLL for (int i = 0; i < 4; ++i) {
        u->q[i] = (int)((v[i] >> shift) & 0x03030303u);
        u->q[i + 4] = (int)((v[i] >> (shift + 2)) & 0x03030303u);
    }
}

/* Bit `bit` of 16 bytes as bit `place` of the first run's codes, the next one for the other. */
INLINE void bit_runs(GLOBAL const uchar* p, const uint bit, const uint place, Unit* u) {
    uint v[4];
    load16(p, v);
    UNROLL for (int i = 0; i < 4; ++i) {
        u->q[i] |= (int)(rotate(v[i], (place - bit) & 31) & (0x01010101u << place));
        u->q[i + 4] |= (int)(rotate(v[i], (place - bit - 1) & 31) & (0x01010101u << place));
    }
}

INLINE Unit piece_q2_k(PIECE_ARGS) {
    Unit u;
    const uint run = c / 2 * 4 + c % 2;
    pair_runs(FIELD(0, 64, c / 4 * 32 + c % 2 * 16), c / 2 % 2 * 4, &u);
    GLOBAL const uchar* s = FIELD(64, 16, run);
    const float d = HALF(80), dmin = HALF(82);
    UNROLL for (int h = 0; h < 2; ++h) {
        u.d[h] = d * (float)(s[2 * h] & 15);
        u.m[h] = -dmin * (float)(s[2 * h] >> 4);
    }
    return u;
}

INLINE Unit piece_q3_k(PIECE_ARGS) {
    Unit u;
    const uint run = c / 2 * 4 + c % 2;
    pair_runs(FIELD(0, 64, c / 4 * 32 + c % 2 * 16), c / 2 % 2 * 4, &u);
    bit_runs(FIELD(64, 32, c % 2 * 16), c / 2 * 2, 2, &u);
    GLOBAL const uchar* s = FIELD(96, 12, 0);
    const float d = HALF(108);
    UNROLL for (int h = 0; h < 2; ++h) {
        const uint g = run + 2 * h;
        const int low = (s[g & 7] >> (4 * (g >> 3))) & 15;
        const int scale = low | ((s[8 + (g & 3)] >> (2 * (g >> 2))) & 3) << 4;
        u.d[h] = d * (float)(scale - 32);
        u.m[h] = -4.0f * u.d[h];
    }
    return u;
}

/* Scale and minimum of groups 2 j and 2 j + 1 of scales_q4_k, which lie in neighbouring bytes. */
INLINE void two_scales_q4_k(GLOBAL const uchar* p, const uint j, Unit* u) {
    uint v[4];
    load16(p, v);
    const float d = half_bits(v[0] & 0xffffu), dmin = half_bits(v[0] >> 16);
    const uint shift = 16 * (j & 1), a = v[1] >> shift, b = v[2] >> shift, c = v[3] >> shift;
    const uint scales = j < 2 ? a & 0x3f3fu : (c & 0x0f0fu) | ((a >> 2) & 0x3030u);
    const uint minima = j < 2 ? b & 0x3f3fu : ((c >> 4) & 0x0f0fu) | ((b >> 2) & 0x3030u);
    UNROLL for (int h = 0; h < 2; ++h) {
        u->d[h] = d * (float)byte_of(scales, h);
        u->m[h] = -dmin * (float)byte_of(minima, h);
    }
}

INLINE Unit piece_q4_k(PIECE_ARGS) {
    Unit u;
    nibbles(FIELD(0, 128, 16 * c), &u);
    two_scales_q4_k(FIELD(128, 16, 0), c / 2, &u);
    return u;
}

INLINE Unit piece_q5_k(PIECE_ARGS) {
    Unit u;
    nibbles(FIELD(0, 128, 16 * c), &u);
    bit_runs(FIELD(128, 32, c % 2 * 16), c / 2 * 2, 4, &u);
    two_scales_q4_k(FIELD(160, 16, 0), c / 2, &u);
    return u;
}

INLINE Unit piece_q6_k(PIECE_ARGS) {
    Unit u;
    uint high[4];
    const uint shift = c / 2 % 2 * 2;
    nibbles(FIELD(0, 128, 16 * c), &u);
    load16(FIELD(128, 64, c / 4 * 32 + c % 2 * 16), high);
    UNROLL for (int i = 0; i < 4; ++i) {
        const uint v = high[i] >> shift;
        u.q[i] |= (int)((v << 4) & 0x30303030u);
        u.q[i + 4] |= (int)(v & 0x30303030u);
    }
    GLOBAL const schar* s = (GLOBAL const schar*)FIELD(192, 16, c / 4 * 8 + c % 4);
    const float d = HALF(208);
    UNROLL for (int h = 0; h < 2; ++h) {
        u.d[h] = d * (float)s[4 * h];
        u.m[h] = -32.0f * u.d[h];
    }
    return u;
}

INLINE Unit piece_q8_k(PIECE_ARGS) {
    Unit u;
    load16(FIELD(0, 256, 16 * c), (uint*)u.q);
    u.d[0] = BITS_FLOAT(*(GLOBAL const uint*)FIELD(256, 4, 0));
    return u;
}
