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
    const uint4 x = *(GLOBAL const uint4*)p;
    v[0] = x.x;
    v[1] = x.y;
    v[2] = x.z;
    v[3] = x.w;
}

INLINE Unit weight_unit(WEIGHT_ARGS, const ulong row, const int k, const int n_in) {
    Unit u;
    uint bits[2 * WEIGHT_BYTES];
    const ulong first = row * (ulong)((n_in + 7) / 8) + (ulong)k;
    load16(w + first * 8 * WEIGHT_BYTES, bits);
#if WEIGHT_BYTES == 4
    load16(w + first * 32 + 16, bits + 4);
    UNROLL for (int i = 0; i < 8; ++i) u.v[i] = BITS_FLOAT(bits[i]);
#else
    UNROLL for (int i = 0; i < 8; ++i) u.v[i] = weight_bits((bits[i >> 1] >> (16 * (i & 1))) & 0xffffu);
#endif
    return u;
}

INLINE XUnit x_unit(X_ARGS, const int t, const int k, const int n_in) {
    XUnit x;
    GLOBAL const float* p = xd + (ulong)t * (ulong)n_in + (ulong)(8 * k);
    if ((n_in & 7) == 0) {
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
        UNROLL for (int i = 0; i < 8; ++i) x.v[i] = 8 * k + i < n_in ? p[i] : 0.0f;
    }
    return x;
}

INLINE float unit_dot(const Unit* u, const XUnit* x) {
    float y = 0.0f;
    UNROLL for (int i = 0; i < 8; ++i) y += u->v[i] * x->v[i];
    return y;
}

INLINE float unit_value(const Unit* u, const int i) {
    return u->v[i];
}
