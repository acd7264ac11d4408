/* A unit: 32 neighbouring weights of a row as signed bytes, with a scale and a minimum for each half.

   weight 4 i + b = d[h] * (byte b of q[i]) + m[h], where h is 0 for i < 4 and 1 for the rest.

   A tensor lies in planes: each field of its blocks is an array of its own, [n_blocks, size of the field], so
   that neighbouring threads read neighbouring 16-byte words. PLANE(before, size) is the field that `before`
   bytes of each block precede. A block is `first`, the same for the whole group, plus `block`: addresses are
   a base that is computed once and 32 bits of offset. */
typedef struct {
    int q[8];
    float d[2];
    float m[2];
} Unit;

#define UNIT_ARGS \
    GLOBAL const uchar* w, const ulong total, const ulong first, const uint block, const int unit, GLOBAL const uint* grid
#define BYTES(before, size, i) (w + (total * (ulong)(before) + first * (ulong)(size)) + (ulong)(i))
#define PLANE(before, size) BYTES(before, size, block * (uint)(size))
#define WORDS(before, size) ((GLOBAL const uint*)PLANE(before, size))
#define HALF(before) half_at((GLOBAL const ushort*)PLANE(before, 2))

/* Piece c of a block: see piece_int8.h. */
#define PIECE_ARGS GLOBAL const uchar *w, const ulong total, const ulong first, const uint block, const uint c

INLINE void load16(GLOBAL const uchar* p, uint* v) {
#ifdef UNITS /* in matvec.c, which reads no weight twice */
    const uint4 x = stream16(p);
#else
    const uint4 x = *(GLOBAL const uint4*)p;
#endif
    v[0] = x.x;
    v[1] = x.y;
    v[2] = x.z;
    v[3] = x.w;
}

INLINE void load32(GLOBAL const uchar* p, uint* v) {
    load16(p, v);
    load16(p + 16, v + 4);
}

/* One scale and minimum for the whole unit. */
INLINE void scale_all(Unit* u, const float d, const float m) {
    u->d[0] = u->d[1] = d;
    u->m[0] = u->m[1] = m;
}

/* 16 bytes: the low nibbles are the first 16 codes, the high ones the others. */
INLINE void nibbles(GLOBAL const uchar* p, Unit* u) {
    uint v[4];
    load16(p, v);
    UNROLL for (int i = 0; i < 4; ++i) {
        u->q[i] = (int)(v[i] & 0x0f0f0f0fu);
        u->q[i + 4] = (int)((v[i] >> 4) & 0x0f0f0f0fu);
    }
}

/* Four bits -> the low bits of four bytes. */
INLINE uint spread(const uint bits) {
    return ((bits & 15u) * 0x00204081u) & 0x01010101u;
}

/* Byte i of a word. */
INLINE uint byte_of(const uint v, const int i) {
    return (v >> (8 * i)) & 255u;
}

/* The four low nibbles of v as entries of a table of 16 bytes. */
INLINE uint lookup4(const uint v, const uint t0, const uint t1, const uint t2, const uint t3) {
    const uint upper = 0x3210u | ((v >> 1) & 0x4444u); /* which half of the table */
    return byte_pick(byte_pick(t0, t1, v), byte_pick(t2, t3, v), upper);
}

/* The nibbles of v as entries of a table of 16 bytes: the low ones of its four bytes, and the high ones. */
INLINE void lookup16(const uint v, const uint t0, const uint t1, const uint t2, const uint t3, int* low, int* high) {
    const uint a = lookup4(v, t0, t1, t2, t3), b = lookup4(v >> 16, t0, t1, t2, t3);
    *low = (int)byte_pick(a, b, 0x6420u);
    *high = (int)byte_pick(a, b, 0x7531u);
}
