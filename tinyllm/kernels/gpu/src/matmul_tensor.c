/* Some rows times a quantised matrix, on tensor cores: weights are decoded to halves on their way into local memory
   and meet there the activations, halves that `cut_rows` of products.c made.

   A group has 8 warps and owns ROWS x TOKENS outputs, of the whole row or of one of `splits` parts of it. The parts
   are added up, always in the same order, by the group that comes last. */
#define ROWS 128
#define THREADS 256
#define STEP 2 /* units of a row at a time: a thread decodes one */
#define DEPTH (STEP * UNIT)
#define STRIDE (DEPTH + 8) /* halves of a row in local memory: eight rows lie in different banks */
#define WARP_TOKENS (TOKENS < 32 ? TOKENS : 32)
#define WARP_ROWS (ROWS * TOKENS / WARP_TOKENS / 8)
#define M_TILES (WARP_ROWS / 16)
#define N_TILES (WARP_TOKENS / 8)
#define SUMS (M_TILES * N_TILES * 4) /* of a thread */
#define X_LOADS ((TOKENS * DEPTH / 8 + THREADS - 1) / THREADS) /* of 16 bytes, of a thread */
#define UP 64.0f /* weights are multiplied with this as halves, so that small ones keep their precision */

#define OUTPUT(i) GLOBAL const uchar *w##i, const ulong total##i, const int n_out##i, GLOBAL const float *bias##i, GLOBAL float *y##i

/* What a product reads, and which part of it a group looks after. */
typedef struct {
    GLOBAL const uchar* w;
    GLOBAL const uint* grid;
    GLOBAL const uchar* x;   /* halves [T, n_in] */
    GLOBAL const int* order; /* token i is row order[i] / share of x, or row i without it */
    ulong total, w_first;
    int first, count, share; /* tokens */
    int row0, n_in, n_out, from, to; /* units */
} Part;

/* 32 weights times UP as 16 pairs of halves. A byte below 0x64 is the half 1024 + the byte. */
INLINE void decode_unit(const Unit* u, uint* h) {
    UNROLL for (int i = 0; i < 8; ++i) {
        const uint d = half2_of(UP * u->d[i / 4], UP * u->d[i / 4]), m = half2_of(UP * u->m[i / 4], UP * u->m[i / 4]);
        const uint q = (uint)u->q[i] ^ 0x80808080u, minus_1152 = 0xe480e480u;
        h[2 * i] = half2_fma(half2_add(byte_pick(q, 0x64646464u, 0x4140u), minus_1152), d, m);
        h[2 * i + 1] = half2_fma(half2_add(byte_pick(q, 0x64646464u, 0x4342u), minus_1152), d, m);
    }
}

INLINE int token_row(const Part* p, const int i) {
    const int t = p->first + (i < p->count ? i : p->count - 1);
    return p->order ? p->order[t] / p->share : t;
}

/* Activations of the units k and k + 1, on their way to local memory. */
INLINE void fetch_x(const Part* p, const int k, SHARED ushort* xs) {
    UNROLL for (int i = 0; i < X_LOADS; ++i) {
        const int c = LOCAL_ID(0) + i * THREADS, t = c / (DEPTH / 8), column = c % (DEPTH / 8) * 8;
        if (t >= TOKENS) continue;
        const int from = k * UNIT + column < p->n_in ? k * UNIT + column : 0; /* where weights are zeros, any numbers */
        copy16(xs + t * STRIDE + column, p->x + 2 * ((ulong)token_row(p, t) * (ulong)p->n_in + (ulong)from));
    }
}

/* Weights of this thread's row and unit: decoded while the ones before are multiplied. */
INLINE void fetch_w(const Part* p, const int k, uint* h) {
    const int row = p->row0 + LOCAL_ID(0) / STEP, unit = k + LOCAL_ID(0) % STEP, there = unit < p->n_in / UNIT;
    const ulong w_row = p->w_first + (ulong)(row < p->n_out ? row : p->n_out - 1);
    Unit u = weight_unit(p->w, p->total, p->grid, w_row, there ? unit : k, p->n_in);
    UNROLL for (int i = 0; i < 2; ++i) { /* beyond the row's end the weights are zeros */
        u.d[i] = there ? u.d[i] : 0.0f;
        u.m[i] = there ? u.m[i] : 0.0f;
    }
    decode_unit(&u, h);
}

INLINE void keep_w(const uint* h, SHARED ushort* ws) {
    SHARED ushort* to = ws + LOCAL_ID(0) / STEP * STRIDE + LOCAL_ID(0) % STEP * UNIT;
    UNROLL for (int i = 0; i < UNIT / 8; ++i) {
        uint4 x;
        x.x = h[4 * i];
        x.y = h[4 * i + 1];
        x.z = h[4 * i + 2];
        x.w = h[4 * i + 3];
        *(SHARED uint4*)(to + 8 * i) = x;
    }
}

/* Where warp tiles begin: of rows and of tokens. */
#define WARP_ROW (LOCAL_ID(0) / 32 % (ROWS / WARP_ROWS) * WARP_ROWS)
#define WARP_TOKEN (LOCAL_ID(0) / 32 / (ROWS / WARP_ROWS) * WARP_TOKENS)

/* acc += rows of ws times tokens of xs. */
INLINE void multiply(float* acc, SHARED const ushort* ws, SHARED const ushort* xs WARP_ARGS) {
    const int lane = LOCAL_ID(0) % 32;
    SHARED const ushort* wp = ws + (WARP_ROW + lane % 16) * STRIDE + lane / 16 * 8;
    SHARED const ushort* xp = xs + (WARP_TOKEN + lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
    UNROLL for (int k = 0; k < DEPTH; k += 16) {
        uint a[M_TILES * 4], b[N_TILES * 2];
        UNROLL for (int i = 0; i < M_TILES; ++i) load_tiles(a + 4 * i, wp + i * 16 * STRIDE + k);
        UNROLL for (int j = 0; j < N_TILES / 2; ++j) load_tiles(b + 4 * j, xp + j * 16 * STRIDE + k);
        UNROLL for (int i = 0; i < M_TILES; ++i)
            UNROLL for (int j = 0; j < N_TILES; ++j) mma(acc + (i * N_TILES + j) * 4, a + 4 * i, b + 2 * j);
    }
}

/* xs has room for two stages: one is filled while the other is read. */
INLINE void add_units(float* acc, const Part* p, SHARED ushort* ws, SHARED ushort* xs WARP_ARGS) {
    uint next[UNIT / 2];
    fetch_x(p, p->from, xs);
    fetch_w(p, p->from, next);
    for (int k = p->from, stage = 0; k < p->to; k += STEP, stage ^= TOKENS * STRIDE) {
        const int ahead = k + STEP < p->to ? k + STEP : k;
        BARRIER(); /* all have multiplied what lies there */
        keep_w(next, ws);
        copies_done();
        BARRIER();
        fetch_x(p, ahead, xs + (stage ^ TOKENS * STRIDE));
        fetch_w(p, ahead, next);
        multiply(acc, ws, xs + stage WARP_PASS);
    }
    copies_done();
}

/* Sums of all parts, in every part's group that is the last to come; false in the others. */
INLINE int last_part(float* acc, GLOBAL float* parts, GLOBAL int* arrived, const int tile, const int n_tiles,
                     const int splits, SHARED int* is_last) {
    const int tid = LOCAL_ID(0), mine = GROUP_ID(2) * n_tiles + tile;
    UNROLL for (int i = 0; i < SUMS; ++i) parts[((ulong)mine * SUMS + i) * THREADS + tid] = acc[i];
    DEVICE_FENCE();
    BARRIER_GLOBAL();
    if (tid == 0) {
        *is_last = ATOMIC_ADD(arrived + tile, 1) == splits - 1;
        if (*is_last) arrived[tile] = 0;
    }
    BARRIER();
    if (!*is_last) return 0;
    DEVICE_FENCE();
    UNROLL for (int i = 0; i < SUMS; ++i) acc[i] = 0.0f;
    for (int s = 0; s < splits; ++s) {
        GLOBAL const volatile float* part = parts + (ulong)(s * n_tiles + tile) * SUMS * THREADS + tid;
        UNROLL for (int i = 0; i < SUMS; ++i) acc[i] += part[i * THREADS];
    }
    return 1;
}

/* y of token i is row order[i], or row i. */
INLINE void write_sums(const float* acc, const Part* p, GLOBAL const float* scales, GLOBAL const float* bias,
                       GLOBAL float* y) {
    const int lane = LOCAL_ID(0) % 32, g = lane / 4, t = lane % 4;
    UNROLL for (int j = 0; j < N_TILES * 2; ++j) {
        const int i = WARP_TOKEN + j / 2 * 8 + 2 * t + j % 2;
        if (i >= p->count) continue;
        const int token = p->order ? p->order[p->first + i] : p->first + i;
        const float scale = scales[token_row(p, i)] / UP;
        UNROLL for (int r = 0; r < M_TILES * 2; ++r) {
            const int row = p->row0 + WARP_ROW + r * 8 + g;
            const float v = scale * acc[(r / 2 * N_TILES + j / 2) * 4 + r % 2 * 2 + j % 2];
            if (row < p->n_out) y[(ulong)token * (ulong)p->n_out + (ulong)row] = bias ? v + bias[row] : v;
        }
    }
}

INLINE void zero(float* acc) {
    UNROLL for (int i = 0; i < SUMS; ++i) acc[i] = 0.0f;
}

/* Up to three matrices of one format on the same x [T, n_in]: the row tiles of the second follow those of the first.
   Groups: tiles of tokens, tiles of rows, splits. arrived: zeros, and zeros again in the end. */
KERNEL void matmul_tensor(OUTPUT(0), OUTPUT(1), OUTPUT(2), GLOBAL const uchar* x, GLOBAL const float* scales,
                          GLOBAL const uint* grid, GLOBAL float* parts, GLOBAL int* arrived, const int n_x,
                          const int n_in, const int splits) {
    WARP_ROOM(THREADS / 32)
    LOCAL ushort ws[ROWS * STRIDE];
    LOCAL ushort xs[2 * TOKENS * STRIDE];
    LOCAL int is_last;
    const int tiles0 = (n_out0 + ROWS - 1) / ROWS, tiles1 = (n_out1 + ROWS - 1) / ROWS, tile = GROUP_ID(1);
    const int which = tile < tiles0 ? 0 : tile < tiles0 + tiles1 ? 1 : 2;
    const int units = (n_in / UNIT + STEP * splits - 1) / (STEP * splits) * STEP; /* of a part */
    Part p;
    p.w = which == 0 ? w0 : which == 1 ? w1 : w2;
    p.total = which == 0 ? total0 : which == 1 ? total1 : total2;
    p.n_out = which == 0 ? n_out0 : which == 1 ? n_out1 : n_out2;
    p.row0 = (which == 0 ? tile : which == 1 ? tile - tiles0 : tile - tiles0 - tiles1) * ROWS;
    p.grid = grid;
    p.x = x;
    p.order = (GLOBAL const int*)0;
    p.w_first = 0;
    p.first = GROUP_ID(0) * TOKENS;
    p.count = n_x - p.first < TOKENS ? n_x - p.first : TOKENS;
    p.share = 1;
    p.n_in = n_in;
    p.from = GROUP_ID(2) * units;
    p.to = p.from + units < n_in / UNIT ? p.from + units : n_in / UNIT;
    float acc[SUMS];
    zero(acc);
    add_units(acc, &p, ws, xs WARP_PASS);
    const int n_tiles = N_GROUPS(0) * N_GROUPS(1), here = tile * N_GROUPS(0) + GROUP_ID(0);
    if (splits > 1 && !last_part(acc, parts, arrived, here, n_tiles, splits, &is_last)) return;
    write_sums(acc, &p, scales, which == 0 ? bias0 : which == 1 ? bias1 : bias2, which == 0 ? y0 : which == 1 ? y1 : y2);
}

/* Choices sorted by expert: see matmul_experts of matmul.c. Groups: tiles of choices, tiles of rows. */
KERNEL void matmul_tensor_experts(GLOBAL const uchar* w, const ulong total, GLOBAL const float* bias, GLOBAL float* y,
                                  GLOBAL const uchar* x, GLOBAL const float* scales, GLOBAL const uint* grid,
                                  GLOBAL const int* order, GLOBAL const int* tiles, const int share, const int n_in,
                                  const int n_out) {
    WARP_ROOM(THREADS / 32)
    LOCAL ushort ws[ROWS * STRIDE];
    LOCAL ushort xs[2 * TOKENS * STRIDE];
    GLOBAL const int* tile = tiles + 3 * GROUP_ID(0);
    if (tile[2] == 0) return;
    Part p;
    p.w = w;
    p.total = total;
    p.n_out = n_out;
    p.row0 = GROUP_ID(1) * ROWS;
    p.grid = grid;
    p.x = x;
    p.order = order;
    p.w_first = (ulong)tile[0] * (ulong)n_out;
    p.first = tile[1];
    p.count = tile[2];
    p.share = share;
    p.n_in = n_in;
    p.from = 0;
    p.to = n_in / UNIT;
    float acc[SUMS];
    zero(acc);
    add_units(acc, &p, ws, xs WARP_PASS);
    write_sums(acc, &p, scales, bias ? bias + p.w_first : bias, y);
}
