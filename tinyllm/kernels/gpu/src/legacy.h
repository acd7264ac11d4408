/* The first formats: blocks of 32 weights with a half-float scale, and a minimum in the _1 types. */

/* planes: qs 16, d 2; weight = d (q - 8) */
INLINE Unit unpack_q4_0(UNIT_ARGS) {
    Unit u;
    nibbles(PLANE(0, 16), &u);
    const float d = HALF(16);
    scale_all(&u, d, -8.0f * d);
    return u;
}

/* planes: qs 16, d 2, m 2; weight = d q + m */
INLINE Unit unpack_q4_1(UNIT_ARGS) {
    Unit u;
    nibbles(PLANE(0, 16), &u);
    scale_all(&u, HALF(16), HALF(18));
    return u;
}

INLINE void fifth_bits(Unit* u, const uint high) {
    UNROLL for (int i = 0; i < 8; ++i) u->q[i] |= (int)(spread(high >> (4 * i)) << 4);
}

/* planes: qs 16, qh 4, d 2; weight = d (q - 16) */
INLINE Unit unpack_q5_0(UNIT_ARGS) {
    Unit u;
    nibbles(PLANE(0, 16), &u);
    fifth_bits(&u, *WORDS(16, 4));
    const float d = HALF(20);
    scale_all(&u, d, -16.0f * d);
    return u;
}

/* planes: qs 16, qh 4, d 2, m 2; weight = d q + m */
INLINE Unit unpack_q5_1(UNIT_ARGS) {
    Unit u;
    nibbles(PLANE(0, 16), &u);
    fifth_bits(&u, *WORDS(16, 4));
    scale_all(&u, HALF(20), HALF(22));
    return u;
}

/* planes: qs 32, d 2; weight = d q. Q8_1 is the same: its sums are for dot products and are not kept. */
INLINE Unit unpack_q8_0(UNIT_ARGS) {
    Unit u;
    load32(PLANE(0, 32), (uint*)u.q);
    scale_all(&u, HALF(32), 0.0f);
    return u;
}

/* A run of 16. */
INLINE Unit piece_q8_0(PIECE_ARGS) {
    Unit u;
    load16(BYTES(0, 32, block * 32 + 16 * c), (uint*)u.q);
    u.d[0] = HALF(32);
    return u;
}
