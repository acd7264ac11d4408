/* What the matrix kernels need of a plain format: eight weights at a time, float products.

   WEIGHT_BYTES is 4 (F32) or 2; BF16 is defined for bfloat16. Rows are padded to a multiple of eight weights.
   The activations are float, in xd [T, n_in]; xq and xs are not used. */
#define UNIT 8
#define WEIGHT_ARGS GLOBAL const uchar* w, const ulong total, GLOBAL const uint* grid
#define X_ARGS GLOBAL const int* xq, GLOBAL const float* xd, GLOBAL const float* xs

typedef struct {
    float v[8];
} Unit;
typedef Unit XUnit;

#if WEIGHT_BYTES == 2
INLINE float weight_bits(const uint bits) {
#ifdef BF16
    return BITS_FLOAT(bits << 16);
#else
    return half_bits(bits);
#endif
}
#endif

INLINE void load16(GLOBAL const uchar* p, uint* v) {
#if defined(UNITS) && WEIGHT_BYTES == 2
    const uint4 x = stream16(p);
#else
    const uint4 x = *(GLOBAL const uint4*)p;
#endif
    v[0] = x.x;
    v[1] = x.y;
    v[2] = x.z;
    v[3] = x.w;
}

INLINE Unit unit_at(GLOBAL const uchar* p) {
    Unit u;
    uint bits[2 * WEIGHT_BYTES];
    load16(p, bits);
#if WEIGHT_BYTES == 4
    load16(p + 16, bits + 4);
    UNROLL for (int i = 0; i < 8; ++i) u.v[i] = BITS_FLOAT(bits[i]);
#else
    UNROLL for (int i = 0; i < 8; ++i) u.v[i] = weight_bits((bits[i >> 1] >> (16 * (i & 1))) & 0xffffu);
#endif
    return u;
}

INLINE Unit weight_unit(WEIGHT_ARGS, const ulong row, const int k, const int n_in) {
    return unit_at(w + (row * (ulong)((n_in + 7) / 8) + (ulong)k) * (8 * WEIGHT_BYTES));
}

/* matvec.c takes units as they are: unit 32 set + lane of the row that comes `row` rows behind the one that begins
   with unit `first`. */
#define PIECES(n_in) (((n_in) + 7) / 8)
#define WHOLE(n_in) (((n_in) & 7) == 0)
#define FIRST(row, n_in) ((row) * (ulong)PIECES(n_in))
#define X_FIRST(t, n_in) ((uint)(t) * (uint)(n_in))
typedef Unit XPiece;

INLINE Unit weight_piece(WEIGHT_ARGS, const ulong first, const uint row, const ulong set, const uint lane,
                         const int n_in) {
    const uint unit = row * (uint)PIECES(n_in) + lane;
    return unit_at(w + (first + 32 * set) * (8 * WEIGHT_BYTES) + (ulong)unit * (8 * WEIGHT_BYTES));
}

/* Eight activations from p on, of which n are left. */
INLINE Unit x_at(GLOBAL const float* p, const int n, const int aligned) {
    Unit x;
    if (aligned) {
        const float4 a = *(GLOBAL const float4*)p, b = *(GLOBAL const float4*)(p + 4);
        x.v[0] = a.x;
        x.v[1] = a.y;
        x.v[2] = a.z;
        x.v[3] = a.w;
        x.v[4] = b.x;
        x.v[5] = b.y;
        x.v[6] = b.z;
        x.v[7] = b.w;
    } else {
        UNROLL for (int i = 0; i < 8; ++i) x.v[i] = i < n ? p[i] : 0.0f;
    }
    return x;
}

INLINE XPiece x_piece(X_ARGS, const uint x, const ulong set, const uint lane, const int n_in,
                       const int whole) {
    return x_at(xd + (ulong)(x + 8 * lane) + 256 * set, n_in - 8 * (int)lane - 256 * (int)set, whole);
}

INLINE XUnit x_unit(X_ARGS, const int t, const int k, const int n_in) {
    return x_at(xd + (ulong)t * (ulong)n_in + (ulong)(8 * k), n_in - 8 * k, WHOLE(n_in));
}

INLINE float unit_dot(const Unit* u, const XUnit* x) {
    float y = 0.0f;
    UNROLL for (int i = 0; i < 8; ++i) y += u->v[i] * x->v[i];
    return y;
}

INLINE float piece_dot(const Unit* u, const XPiece* x, float y) {
    UNROLL for (int i = 0; i < 8; ++i) y += u->v[i] * x->v[i];
    return y;
}

INLINE float unit_value(const Unit* u, const int i) {
    return u->v[i];
}
