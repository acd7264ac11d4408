/* What one lane of matvec.c takes of a row of quantised weights: a piece of two runs of 16 weights.

   Where one load gives both halves of a unit, a piece is a unit. Elsewhere PIECE is the format's own function, and
   the runs lie APART (2, 4, or 0: half a row) runs from each other, so that neighbouring lanes load neighbouring 16
   bytes, of the weights and mostly of the activations, and no byte is read by two lanes that share it out. With
   RATIO a minimum is so many times its scale. */
#ifdef PIECE
#define ONE_SCALE 0
#else
#define APART 1
#define ONE_SCALE (SCALES == 1)
#endif
#if APART
#define RUN(p) ((p) + (p) / APART * APART)
#define RUN_BEHIND(n_in) APART
#else
#define RUN(p) (p)
#define RUN_BEHIND(n_in) (uint)((n_in) / 32)
#endif
#define FIRST(row, n_in) ((row) * (ulong)((n_in) / BLOCK))
#define X_FIRST(t, n_in) ((uint)(t) * (uint)((n_in) / 16))
#define PIECES(n_in) ((n_in) / 32)

typedef struct {
    int q[8];
    float d[2];
    float s[2];
} XPiece;

/* Piece p of the row that comes `row` rows behind the one that begins with block `first`. */
INLINE Unit weight_piece(WEIGHT_ARGS, const ulong first, const uint row, const uint p, const int n_in) {
    const uint block = row * (uint)(n_in / BLOCK);
#ifdef PIECE
    return PIECE(w, total, first, block, p, grid, n_in);
#else
    return UNPACK(w, total, first, block + p / (BLOCK / UNIT), (int)(p % (BLOCK / UNIT)), grid);
#endif
}

/* The activations that piece p multiplies with; x is the first run of their row. */
INLINE XPiece x_piece(X_ARGS, const uint x, const uint p, const int n_in) {
    XPiece v;
    const uint a = x + RUN(p), b = a + RUN_BEHIND(n_in);
    const uint4 lo = *((GLOBAL const uint4*)xq + a), hi = *((GLOBAL const uint4*)xq + b);
    v.q[0] = (int)lo.x;
    v.q[1] = (int)lo.y;
    v.q[2] = (int)lo.z;
    v.q[3] = (int)lo.w;
    v.q[4] = (int)hi.x;
    v.q[5] = (int)hi.y;
    v.q[6] = (int)hi.z;
    v.q[7] = (int)hi.w;
#ifdef PIECE
    v.d[0] = xd[a / 2];
    v.d[1] = xd[b / 2];
#if MINS
    v.s[0] = xs[a];
    v.s[1] = xs[b];
#endif
#else
    v.d[0] = v.d[1] = xd[a / 2];
#if MINS
    const float2 s = *((GLOBAL const float2*)xs + a / 2);
    v.s[0] = s.x;
    v.s[1] = s.y;
#endif
#endif
#if MINS && ONE_SCALE
    v.s[0] += v.s[1];
#endif
#ifdef RATIO
    v.s[0] *= RATIO;
    v.s[1] *= RATIO;
#endif
    return v;
}

/* y + the product of a piece. */
INLINE float piece_dot(const Unit* u, const XPiece* x, float y) {
    int a = 0, b = 0;
    UNROLL for (int i = 0; i < 4; ++i) a = dot4(u->q[i], x->q[i], a);
    UNROLL for (int i = 4; i < 8; ++i) b = dot4(u->q[i], x->q[i], b);
#if ONE_SCALE
    const int sums[1] = {a + b};
#else
    const int sums[2] = {a, b};
#endif
    UNROLL for (int h = 0; h < (ONE_SCALE ? 1 : 2); ++h) {
#ifdef RATIO
        y += u->d[h] * (x->d[h] * (float)sums[h] + x->s[h]);
#else
        y += u->d[h] * x->d[h] * (float)sums[h];
#if MINS
        y += u->m[h] * x->s[h];
#endif
#endif
    }
    return y;
}
