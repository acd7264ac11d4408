/* What the matrix kernels need of a quantised format: 32 weights at a time, integer products.

   UNPACK, BLOCK (weights in a block), SCALES (1 or 2 in a unit) and MINS (0 or 1) come from the format table.
   The activations are int8: codes xq [T, n_in], and for each 32 of them a scale xd [T, n_in / 32] and two sums
   of 16 codes times the scale, xs [T, n_in / 32, 2]. */
#define UNIT 32
#define WEIGHT_ARGS GLOBAL const uchar* w, const ulong total, GLOBAL const uint* grid
#define X_ARGS GLOBAL const int* xq, GLOBAL const float* xd, GLOBAL const float* xs

typedef struct {
    int q[8];
    float d;
    float s[2];
} XUnit;

/* Unit k of a row; n_in weights in a row. */
INLINE Unit weight_unit(WEIGHT_ARGS, const ulong row, const int k, const int n_in) {
    const ulong first = row * (ulong)(n_in / BLOCK);
    return UNPACK(w, total, first, (uint)k / (BLOCK / UNIT), k % (BLOCK / UNIT), grid);
}

INLINE XUnit x_unit(X_ARGS, const int t, const int k, const int n_in) {
    XUnit x;
    const ulong i = (ulong)t * (ulong)(n_in / UNIT) + (ulong)k;
    const uint4 lo = *((GLOBAL const uint4*)xq + 2 * i), hi = *((GLOBAL const uint4*)xq + 2 * i + 1);
    x.q[0] = (int)lo.x;
    x.q[1] = (int)lo.y;
    x.q[2] = (int)lo.z;
    x.q[3] = (int)lo.w;
    x.q[4] = (int)hi.x;
    x.q[5] = (int)hi.y;
    x.q[6] = (int)hi.z;
    x.q[7] = (int)hi.w;
    x.d = xd[i];
#if MINS
    x.s[0] = xs[2 * i];
    x.s[1] = xs[2 * i + 1];
#endif
    return x;
}

INLINE float unit_dot(const Unit* u, const XUnit* x) {
    int a = 0, b = 0;
    UNROLL for (int i = 0; i < 4; ++i) {
        a = dot4(u->q[i], x->q[i], a);
        b = dot4(u->q[i + 4], x->q[i + 4], b);
    }
#if SCALES == 1
    float y = x->d * u->d[0] * (float)(a + b);
#else
    float y = x->d * (u->d[0] * (float)a + u->d[1] * (float)b);
#endif
#if MINS && SCALES == 1
    y += u->m[0] * (x->s[0] + x->s[1]);
#elif MINS
    y += u->m[0] * x->s[0] + u->m[1] * x->s[1];
#endif
    return y;
}

/* Weight i (0 to 31) of a unit. */
INLINE float unit_value(const Unit* u, const int i) {
    const schar q = (schar)byte_of((uint)u->q[i >> 2], i & 3);
    return u->d[i >> 4] * (float)q + u->m[i >> 4];
}
