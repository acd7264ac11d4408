/* Few rows (1 to 8 at a time) times a matrix: each weight is read once and goes straight into registers.

   A group has WARPS x 32 threads. Each 32 lanes go over ROWS rows of the matrix, unit by unit; when there are
   too few rows to fill the device, `split` (1, 2 or 4) of them share the units of the same rows. The lanes'
   sums meet in local memory once, at the end. */
#define LANES 32
#define WARPS 4
#define ROWS 2
#define MOST 8 /* rows of x at once */
#define PAD 33 /* so that the threads that add up do not meet in one bank */

#define OUTPUT(i) GLOBAL const uchar *w##i, const ulong total##i, const int n_out##i, GLOBAL const float *bias##i, GLOBAL float *y##i

/* One matrix of n_out rows, the first of which is row `first` of w; x rows t0 to t0 + m_tile. */
INLINE void matvec(const int m_tile, WEIGHT_ARGS, const ulong first, X_ARGS, GLOBAL const float* bias,
                   GLOBAL float* y, const int group, const int t0, const int t_step, const int n_x, const int n_in,
                   const int n_out, const int split, SHARED float* sums) {
    const int lane = LOCAL_ID(0), warp = LOCAL_ID(1);
    const int n_units = (n_in + UNIT - 1) / UNIT;
    const int row0 = (group * (WARPS / split) + warp / split) * ROWS;
    float acc[ROWS * MOST];
    UNROLL for (int i = 0; i < ROWS * MOST; ++i) acc[i] = 0.0f;
    for (int k = (warp % split) * LANES + lane; k < n_units; k += split * LANES) {
        Unit u[ROWS];
        UNROLL for (int r = 0; r < ROWS; ++r)
            u[r] = weight_unit(w, total, grid, first + (ulong)(row0 + r < n_out ? row0 + r : n_out - 1), k, n_in);
        UNROLL for (int m = 0; m < MOST; ++m) {
            if (m >= m_tile) continue; /* m_tile is a constant where this is inlined */
            const XUnit x = x_unit(xq, xd, xs, (t0 + m < n_x ? t0 + m : n_x - 1) / t_step, k, n_in);
            UNROLL for (int r = 0; r < ROWS; ++r) acc[m * ROWS + r] += unit_dot(&u[r], &x);
        }
    }
    UNROLL for (int i = 0; i < ROWS * MOST; ++i)
        if (i < ROWS * m_tile) sums[(i * WARPS + warp) * PAD + lane] = acc[i];
    BARRIER();
    /* Thread j adds up output j: (token and row) i of the warps that share these rows. */
    const int n_sums = ROWS * m_tile * (WARPS / split);
    for (int j = warp * LANES + lane; j < n_sums; j += WARPS * LANES) {
        const int i = j % (ROWS * m_tile), part = j / (ROWS * m_tile);
        const int row = (group * (WARPS / split) + part) * ROWS + i % ROWS, t = t0 + i / ROWS;
        float sum = 0.0f;
        for (int s = 0; s < split; ++s)
            for (int l = 0; l < LANES; ++l) sum += sums[(i * WARPS + part * split + s) * PAD + l];
        if (row < n_out && t < n_x) y[(ulong)t * (ulong)n_out + (ulong)row] = bias ? sum + bias[row] : sum;
    }
}

/* Up to three matrices of one format on the same x: the groups of the second follow those of the first. */
#define MATVEC(m)                                                                                               \
    KERNEL void matvec_##m(OUTPUT(0), OUTPUT(1), OUTPUT(2), X_ARGS, GLOBAL const uint* grid, const int n_x,       \
                           const int n_in, const int split) {                                                    \
        LOCAL float sums[ROWS * (m) * WARPS * PAD];                                                              \
        const int per_group = ROWS * WARPS / split;                                                              \
        const int groups0 = (n_out0 + per_group - 1) / per_group, groups1 = (n_out1 + per_group - 1) / per_group; \
        const int t0 = GROUP_ID(1) * (m), g = GROUP_ID(0);                                                       \
        const int which = g < groups0 ? 0 : g < groups0 + groups1 ? 1 : 2;                                       \
        matvec(m, which == 0 ? w0 : which == 1 ? w1 : w2, which == 0 ? total0 : which == 1 ? total1 : total2,    \
               grid, 0, xq, xd, xs, which == 0 ? bias0 : which == 1 ? bias1 : bias2,                             \
               which == 0 ? y0 : which == 1 ? y1 : y2,                                                           \
               which == 0 ? g : which == 1 ? g - groups0 : g - groups0 - groups1, t0, 1, n_x, n_in,              \
               which == 0 ? n_out0 : which == 1 ? n_out1 : n_out2, split, sums);                                 \
    }

MATVEC(1)
MATVEC(2)
MATVEC(4)
MATVEC(8)

/* Choice c of every row through its own matrix of the stack: x row c / share, y row c. */
KERNEL void matvec_experts(GLOBAL const uchar* w, const ulong total, GLOBAL const float* bias, GLOBAL float* y, X_ARGS,
                           GLOBAL const uint* grid, GLOBAL const int* experts, const int n_choices, const int share,
                           const int n_in, const int n_out, const int split) {
    LOCAL float sums[ROWS * WARPS * PAD];
    const int c = GROUP_ID(1);
    const ulong first = (ulong)experts[c] * (ulong)n_out;
    matvec(1, w, total, grid, first, xq, xd, xs, bias ? bias + first : bias, y, GROUP_ID(0), c, share, n_choices, n_in,
           n_out, split, sums);
}

/* Rows `ids` of the matrix, decoded: y [T, n_in]; one thread for each unit. */
KERNEL void embed(WEIGHT_ARGS, GLOBAL const int* ids, GLOBAL float* y, const int n_in, const float scale) {
    const int k = GROUP_ID(1) * LANES + LOCAL_ID(0), t = GROUP_ID(0);
    if (k * UNIT >= n_in) return;
    const Unit u = weight_unit(w, total, grid, (ulong)ids[t], k, n_in);
    GLOBAL float* out = y + (ulong)t * (ulong)n_in + (ulong)(k * UNIT);
    UNROLL for (int i = 0; i < UNIT; ++i)
        if (k * UNIT + i < n_in) out[i] = scale * unit_value(&u, i);
}

/* Rows from `first` on as half floats [rows, n_in], for a library's matrix product. */
KERNEL void decode_rows(WEIGHT_ARGS, GLOBAL ushort* y, const ulong first, const int n_in) {
    const int k = GLOBAL_ID(0), row = GROUP_ID(1);
    if (k * UNIT >= n_in) return;
    const Unit u = weight_unit(w, total, grid, first + (ulong)row, k, n_in);
    GLOBAL ushort* out = y + (ulong)row * (ulong)n_in + (ulong)(k * UNIT);
    UNROLL for (int i = 0; i < UNIT; ++i)
        if (k * UNIT + i < n_in) half_store(out + i, unit_value(&u, i));
}
