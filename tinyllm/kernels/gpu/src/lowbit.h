/* One and two bits, three values, and four-bit floats. */

/* planes: qs 48, qh 4, d 2; weight = d (digit - 1), five base-3 digits in a byte (gguf/quants/ternary.py) */
INLINE uint digits4(const uint v, const int n) {
    const uint power = n == 4 ? 81u : byte_of(0x1b090301u, n), even = v & 0x00ff00ffu, odd = (v >> 8) & 0x00ff00ffu;
    const uint a = ((even * power) & 0x00ff00ffu) * 3u, b = ((odd * power) & 0x00ff00ffu) * 3u; /* two at once */
    return ((a >> 8) & 0x00030003u) | (b & 0x03000300u);
}

INLINE Unit unpack_tq1_0(UNIT_ARGS) {
    Unit u;
    GLOBAL const uint* qs = WORDS(0, 48);
    const uint last = *WORDS(48, 4);
    UNROLL for (int i = 0; i < 8; ++i) {
        const int row = unit < 5 ? i : 8 + (i & 3);
        const int digit = unit < 5 ? unit : 2 * (unit - 5) + (i >> 2);
        u.q[i] = (int)(digit < 5 ? digits4(qs[row], digit) : digits4(last, i & 3));
    }
    const float d = HALF(52);
    scale_all(&u, d, -d);
    return u;
}

/* planes: qs 64, d 2; weight = d (q - 1) */
INLINE Unit unpack_tq2_0(UNIT_ARGS) {
    Unit u;
    pairs(PLANE(0, 64) + 32 * (unit >> 2), 2 * (unit & 3), &u);
    const float d = HALF(64);
    scale_all(&u, d, -d);
    return u;
}

/* planes: qs 16, d 2; blocks of 128; weight = d or -d */
INLINE Unit unpack_q1_0(UNIT_ARGS) {
    Unit u;
    const uint bits = WORDS(0, 16)[unit];
    UNROLL for (int i = 0; i < 8; ++i) u.q[i] = (int)spread(bits >> (4 * i));
    const float d = HALF(16);
    scale_all(&u, 2.0f * d, -d);
    return u;
}

/* planes: qs 16, d 2; blocks of 64; weight = d (q - 1) */
INLINE Unit unpack_q2_0(UNIT_ARGS) {
    Unit u;
    UNROLL for (int i = 0; i < 8; ++i) {
        const uint b = byte_of(WORDS(0, 16)[2 * unit + (i >> 2)], i & 3);
        u.q[i] = (int)((b & 3u) | (b & 12u) << 6 | (b & 48u) << 12 | (b & 192u) << 18);
    }
    const float d = HALF(16);
    scale_all(&u, d, -d);
    return u;
}

/* Eight nibbles to twice their float4 (E2M1) values: 0 1 2 3 4 6 8 12 and their negatives. */
INLINE void e2m1(const uint codes, int* low, int* high) {
    lookup16(codes, 0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu, low, high);
}

/* planes: qs 16, e 1; weight = 2^(e - 128) E2M1; exponents 0 and 1 are subnormal */
INLINE Unit unpack_mxfp4(UNIT_ARGS) {
    Unit u;
    uint v[4];
    load16(PLANE(0, 16), v);
    UNROLL for (int i = 0; i < 4; ++i) e2m1(v[i], u.q + i, u.q + 4 + i);
    const uint e = *PLANE(16, 1);
    scale_all(&u, BITS_FLOAT(e < 2 ? 0x200000u << e : (e - 1) << 23), 0.0f);
    return u;
}

/* Half of an unsigned E4M3; 0x7f, which is NaN elsewhere, is 0. */
INLINE float half_e4m3(const uint c) {
    const uint bits = (c & 0x7fu) << 7; /* as a half float, whose exponents are 8 less */
    return c == 0x7fu ? 0.0f : 128.0f * half_bits(bits);
}

/* planes: qs 32, d 4; blocks of 64; groups of 16, eight bytes each */
INLINE Unit unpack_nvfp4(UNIT_ARGS) {
    Unit u;
    uint v[4];
    load16(PLANE(0, 32) + 16 * unit, v);
    GLOBAL const uchar* d = PLANE(32, 4) + 2 * unit;
    UNROLL for (int h = 0; h < 2; ++h) {
        UNROLL for (int i = 0; i < 2; ++i) e2m1(v[2 * h + i], u.q + 4 * h + i, u.q + 4 * h + 2 + i);
        u.d[h] = half_e4m3(d[h]);
        u.m[h] = 0.0f;
    }
    return u;
}
