/* What one lane of matvec.c takes of a row of quantised weights at a time: a piece of two runs of 16, or of one.

   Where one load gives both halves of a unit, a piece is a unit. Elsewhere PIECE is the format's own function: its
   runs lie APART (2 or 4) runs from each other, because one load gives both, or (0) it is a single run. So
   neighbouring lanes load neighbouring 16 bytes, of the weights and mostly of the activations. With RATIO a minimum
   is so many times its scale. */
#ifndef PIECE
#define APART 1
#endif
#if APART
#define PIECE_RUNS 2
#define RUN(lane) ((lane) + (lane) / APART * APART)
#else
#define PIECE_RUNS 1
#define RUN(lane) (lane)
#endif
#define N_SCALES (APART == 0 || (APART == 1 && SCALES == 1) ? 1 : 2)
#define PIECES(n_in) ((n_in) / (16 * PIECE_RUNS))
#define PIECES_OF (BLOCK / (16 * PIECE_RUNS)) /* of a block */
#define WHOLE(n_in) 1 /* is a row made of whole units? */
#define FIRST(row, n_in) ((row) * (ulong)((n_in) / BLOCK))
#define X_FIRST(t, n_in) ((uint)(t) * (uint)((n_in) / 16))

typedef struct {
    int q[8];
    float d[2];
    float s[2];
} XPiece;

/* Piece 32 set + lane of the row that comes `row` rows behind the one that begins with block `first`. */
INLINE Unit weight_piece(WEIGHT_ARGS, const ulong first, const uint row, const ulong set, const uint lane,
                         const int n_in) {
    const ulong ahead = first + set * (32 / PIECES_OF);
    const uint block = row * (uint)(n_in / BLOCK) + lane / PIECES_OF;
#ifdef PIECE
    return PIECE(w, total, ahead, block, lane % PIECES_OF);
#else
    return UNPACK(w, total, ahead, block, (int)(lane % PIECES_OF), grid);
#endif
}

/* The activations that this piece multiplies with; x is the first run of their row. */
INLINE XPiece x_piece(X_ARGS, const uint x, const ulong set, const uint lane, const int n_in,
                       const int whole) {
    XPiece v;
    UNROLL for (int h = 0; h < PIECE_RUNS; ++h) {
        const ulong run = (ulong)(x + RUN(lane)) + 32 * PIECE_RUNS * set + (ulong)(h * APART);
        const uint4 q = *((GLOBAL const uint4*)xq + run);
        v.q[4 * h] = (int)q.x;
        v.q[4 * h + 1] = (int)q.y;
        v.q[4 * h + 2] = (int)q.z;
        v.q[4 * h + 3] = (int)q.w;
#if APART != 1
        v.d[h] = xd[(x + RUN(lane)) / 2 + 16 * PIECE_RUNS * set + (ulong)(h * APART / 2)];
#if MINS
        v.s[h] = xs[run];
#endif
#endif
    }
#if APART == 1
    const ulong unit = (ulong)(x / 2 + lane) + 32 * set;
    v.d[0] = v.d[1] = xd[unit];
#if MINS
    const float2 s = *((GLOBAL const float2*)xs + unit);
    v.s[0] = SCALES == 1 ? s.x + s.y : s.x;
    v.s[1] = s.y;
#endif
#endif
#ifdef RATIO
    UNROLL for (int h = 0; h < N_SCALES; ++h) v.s[h] *= RATIO;
#endif
    return v;
}

/* y + the product of a piece. */
INLINE float piece_dot(const Unit* u, const XPiece* x, float y) {
    int sums[2] = {0, 0};
    UNROLL for (int i = 0; i < 4; ++i) sums[0] = dot4(u->q[i], x->q[i], sums[0]);
#if APART
    UNROLL for (int i = 4; i < 8; ++i) sums[N_SCALES - 1] = dot4(u->q[i], x->q[i], sums[N_SCALES - 1]);
#endif
    UNROLL for (int h = 0; h < N_SCALES; ++h) {
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
