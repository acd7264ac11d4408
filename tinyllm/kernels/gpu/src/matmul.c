/* Many rows times a matrix: a tile of TOKENS x ROWS outputs in each group of 128 threads, both sides staged in
   local memory, STEP units at a time. Each thread owns 4 tokens x 4 rows. */
#define TOKENS 32
#define ROWS 64
#define THREADS 128
#define STEP (THREADS / ROWS)

/* Tokens order[first .. first + count) (or first .. first + count themselves) and rows row0 .. row0 + ROWS. */
INLINE void matmul_tile(WEIGHT_ARGS, const ulong w_first, X_ARGS, GLOBAL const float* bias, GLOBAL float* y,
                        GLOBAL const int* order, const int first, const int count, const int share, const int row0,
                        const int n_in, const int n_out, SHARED Unit* wt, SHARED XUnit* xt) {
    const int tid = LOCAL_ID(0), tx = tid % 16, ty = tid / 16;
    const int n_units = (n_in + UNIT - 1) / UNIT;
    float acc[16];
    UNROLL for (int i = 0; i < 16; ++i) acc[i] = 0.0f;
    for (int k0 = 0; k0 < n_units; k0 += STEP) {
        const int row = row0 + tid % ROWS, k = k0 + tid / ROWS;
        if (k < n_units)
            wt[tid] = weight_unit(w, total, grid, w_first + (ulong)(row < n_out ? row : n_out - 1), k, n_in);
        if (tid < TOKENS * STEP && k0 + tid / TOKENS < n_units) {
            const int i = first + (tid % TOKENS < count ? tid % TOKENS : count - 1);
            xt[tid] = x_unit(xq, xd, xs, (order ? order[i] : i) / share, k0 + tid / TOKENS, n_in);
        }
        BARRIER();
        for (int s = 0; s < STEP && k0 + s < n_units; ++s) {
            XUnit x[4];
            UNROLL for (int i = 0; i < 4; ++i) x[i] = xt[s * TOKENS + ty * 4 + i];
            UNROLL for (int j = 0; j < 4; ++j) {
                const Unit u = wt[s * ROWS + tx + 16 * j];
                UNROLL for (int i = 0; i < 4; ++i) acc[i * 4 + j] += unit_dot(&u, &x[i]);
            }
        }
        BARRIER();
    }
    UNROLL for (int i = 0; i < 4; ++i) {
        if (ty * 4 + i >= count) continue;
        const int t = order ? order[first + ty * 4 + i] : first + ty * 4 + i;
        UNROLL for (int j = 0; j < 4; ++j) {
            const int n = row0 + tx + 16 * j;
            if (n < n_out) y[(ulong)t * (ulong)n_out + (ulong)n] = bias ? acc[i * 4 + j] + bias[n] : acc[i * 4 + j];
        }
    }
}

KERNEL void matmul(GLOBAL const uchar* w, const ulong total, GLOBAL const float* bias, GLOBAL float* y, X_ARGS,
                   GLOBAL const uint* grid, const int n_x, const int n_in, const int n_out) {
    LOCAL Unit wt[ROWS * STEP];
    LOCAL XUnit xt[TOKENS * STEP];
    const int first = GROUP_ID(1) * TOKENS, left = n_x - first;
    matmul_tile(w, total, grid, 0, xq, xd, xs, bias, y, (GLOBAL const int*)0, first, left < TOKENS ? left : TOKENS, 1,
                GROUP_ID(0) * ROWS, n_in, n_out, wt, xt);
}

/* Choices sorted by expert: `order` lists them, tiles [n][3] are (expert, first in order, count), count 0: none. */
KERNEL void matmul_experts(GLOBAL const uchar* w, const ulong total, GLOBAL const float* bias, GLOBAL float* y, X_ARGS,
                           GLOBAL const uint* grid, GLOBAL const int* order, GLOBAL const int* tiles, const int share,
                           const int n_in, const int n_out) {
    LOCAL Unit wt[ROWS * STEP];
    LOCAL XUnit xt[TOKENS * STEP];
    GLOBAL const int* tile = tiles + 3 * GROUP_ID(1);
    if (tile[2] == 0) return;
    const ulong first = (ulong)tile[0] * (ulong)n_out;
    matmul_tile(w, total, grid, first, xq, xd, xs, bias ? bias + first : bias, y, order, tile[1], tile[2], share,
                GROUP_ID(0) * ROWS, n_in, n_out, wt, xt);
}
