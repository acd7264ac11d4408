/* Few rows (1 to 8 at a time) times a matrix: each weight is read once and goes straight into registers.

   A group has WARPS x 32 threads. Each 32 lanes go over ROWS rows of the matrix, piece by piece, and load UNITS
   pieces of each row before they use the first (one where many rows of x wait for it): a memory that answers after 700 clocks wants some 30 KB asked for
   at any time by each core. When there are too few rows to fill the device, 1 << split (1, 2 or 4) warps share the
   pieces of the same rows. The lanes' sums meet at the end. */
#define LANES 32
#define WARPS 4
#define ROWS 2
#define MOST 8 /* rows of x at once */
#define PAD (LANE_PARTS | 1) /* so that the threads that add up do not meet in one bank */

/* Activations that are only to be divided by their root mean square: the sums of squares of runs of them (matvec_add
   made both). A product is linear, so dividing it is enough. No sums: nothing to divide by. */
#define SQUARES GLOBAL const float *squares, const int n_squares, const float eps
#define OUTPUT(i) GLOBAL const uchar *w##i, const ulong total##i, const int n_out##i, GLOBAL const float *bias##i, GLOBAL float *y##i

/* The lane's pieces of `units` sets of ROWS rows times m_tile rows of x: added to acc [m_tile, ROWS]. The first two
   are constants where this is inlined. The upper half of the rows are those of w2. */
INLINE void add_pieces(const int units, const int m_tile, WEIGHT_ARGS, GLOBAL const uchar* w2, const ulong first, const uint* rows, X_ARGS,
                       const uint* x_rows, const ulong set, const uint lane, const int n_in, const int whole,
                       float* acc) {
    Unit u[UNITS * ROWS];
    UNROLL for (int j = 0; j < UNITS * ROWS; ++j)
        if (j < units * ROWS)
            u[j] = weight_piece(j % ROWS < ROWS / 2 ? w : w2, total, grid, first, rows[j % ROWS], set + (ulong)(j / ROWS), lane, n_in);
    UNROLL for (int m = 0; m < MOST; ++m) {
        UNROLL for (int j = 0; j < UNITS; ++j) {
            if (m >= m_tile || j >= units) continue;
            const XPiece x = x_piece(xq, xd, xs, x_rows[m], set + (ulong)j, lane, n_in, whole);
            UNROLL for (int r = 0; r < ROWS; ++r)
                acc[m * ROWS + r] = piece_dot(&u[j * ROWS + r], &x, acc[m * ROWS + r]);
        }
    }
}

/* All pieces of the rows that are this lane's: 1 << split warps share them. */
INLINE void add_row(const int m_tile, WEIGHT_ARGS, GLOBAL const uchar* w2, const ulong first, const uint* rows, X_ARGS,
                    const uint* x_rows, const int n_in, const int split, float* acc) {
    const uint lane = (uint)LOCAL_ID(0);
    const int n = PIECES(n_in), units = m_tile > 2 ? 1 : UNITS;
    int set = (LOCAL_ID(1) & ((1 << split) - 1)) * units;
    UNROLL for (int i = 0; i < ROWS * MOST; ++i) acc[i] = 0.0f;
    for (; WHOLE(n_in) && (set + units - 1) * LANES + (int)lane < n; set += units << split)
        add_pieces(units, m_tile, w, total, grid, w2, first, rows, xq, xd, xs, x_rows, (ulong)set, lane, n_in, 1, acc);
    if (units == 1 && WHOLE(n_in)) return;
    for (; set * LANES + (int)lane < n; set += set % units == units - 1 ? (units << split) - units + 1 : 1)
        add_pieces(1, m_tile, w, total, grid, w2, first, rows, xq, xd, xs, x_rows, (ulong)set, lane, n_in, WHOLE(n_in),
                   acc);
}

/* This lane's part of the sum of squares. */
INLINE float square_part(GLOBAL const float* squares, const int n_squares) {
    float sum = 0.0f;
    if (squares)
        for (int i = LOCAL_ID(0); i < n_squares; i += LANES) sum += squares[i];
    return sum;
}

/* What the product is multiplied with, of the parts of the sum of squares. */
INLINE float shrink_of(GLOBAL const float* squares, SHARED const float* parts, const int n_in, const float eps) {
    float sum = 0.0f;
    for (int l = 0; l < LANE_PARTS; ++l) sum += parts[l];
    return squares ? 1.0f / sqrt(sum / (float)n_in + eps) : 1.0f;
}

/* One matrix of n_out rows, the first of which is row `first` of w; x rows t0 to t0 + m_tile. */
INLINE void matvec(const int m_tile, WEIGHT_ARGS, const ulong first, X_ARGS, GLOBAL const float* bias,
                   GLOBAL float* y, const int group, const int t0, const int t_step, const int n_x, const int n_in,
                   const int n_out, const int split, SQUARES, SHARED float* sums, SHARED float* norm) {
    const int lane = LOCAL_ID(0), warp = LOCAL_ID(1), sharers = WARPS >> split;
    const int group_row = group * sharers * ROWS, row0 = (warp >> split) * ROWS, last = n_out - 1 - group_row;
    const ulong start = FIRST(first + (ulong)group_row, n_in);
    const float square = square_part(squares, n_squares);
    uint rows[ROWS], x_rows[MOST];
    float acc[ROWS * MOST];
    UNROLL for (int r = 0; r < ROWS; ++r) rows[r] = (uint)(row0 + r < last ? row0 + r : last);
    UNROLL for (int m = 0; m < MOST; ++m)
        x_rows[m] = X_FIRST((t0 + m < n_x ? t0 + m : n_x - 1) / t_step, n_in);
    add_row(m_tile, w, total, grid, w, start, rows, xq, xd, xs, x_rows, n_in, split, acc);
    UNROLL for (int i = 0; i < ROWS * MOST; ++i) {
        if (i >= ROWS * m_tile) continue;
        const float sum = lanes_sum(acc[i]);
        if (lane < LANE_PARTS) sums[(i * WARPS + warp) * PAD + lane] = sum;
    }
    const float square_sum = lanes_sum(square);
    if (warp == 0 && lane < LANE_PARTS) norm[lane] = square_sum;
    BARRIER();
    const float shrink = shrink_of(squares, norm, n_in, eps);
    /* Thread j adds up output j: (token and row) i of the warps that share these rows. */
    for (int j = warp * LANES + lane; j < ROWS * m_tile * sharers; j += WARPS * LANES) {
        const int i = j % (ROWS * m_tile), part = j / (ROWS * m_tile);
        const int row = group_row + part * ROWS + i % ROWS, t = t0 + i / ROWS;
        float sum = 0.0f;
        for (int s = 0; s < 1 << split; ++s)
            for (int l = 0; l < LANE_PARTS; ++l) sum += sums[(i * WARPS + (part << split) + s) * PAD + l];
        if (row < n_out && t < n_x) y[(ulong)t * (ulong)n_out + (ulong)row] = bias ? sum * shrink + bias[row] : sum * shrink;
    }
}

/* Up to three matrices of one format on the same x: the groups of the second follow those of the first. */
#define GROUPS(n_out, split) (int)(((uint)((n_out) + (ROWS * WARPS >> (split)) - 1) << (split)) / (ROWS * WARPS))
#define MATVEC(m, groups)                                                                                       \
    KERNEL_OF(WARPS* LANES, groups)                                                                             \
    void matvec_##m(OUTPUT(0), OUTPUT(1), OUTPUT(2), X_ARGS, GLOBAL const uint* grid, const int n_x,              \
                    const int n_in, const int split, SQUARES) {                                                  \
        LOCAL float sums[ROWS * (m) * WARPS * PAD];                                                              \
        LOCAL float norm[LANE_PARTS];                                                                            \
        const int groups0 = GROUPS(n_out0, split), groups1 = GROUPS(n_out1, split);                               \
        const int t0 = GROUP_ID(1) * (m), g = GROUP_ID(0);                                                       \
        const int which = g < groups0 ? 0 : g < groups0 + groups1 ? 1 : 2;                                       \
        matvec(m, which == 0 ? w0 : which == 1 ? w1 : w2, which == 0 ? total0 : which == 1 ? total1 : total2,    \
               grid, 0, xq, xd, xs, which == 0 ? bias0 : which == 1 ? bias1 : bias2,                             \
               which == 0 ? y0 : which == 1 ? y1 : y2,                                                           \
               which == 0 ? g : which == 1 ? g - groups0 : g - groups0 - groups1, t0, 1, n_x, n_in,              \
               which == 0 ? n_out0 : which == 1 ? n_out1 : n_out2, split, squares, n_squares, eps, sums, norm);   \
    }

MATVEC(1, 8)
MATVEC(2, 5)
MATVEC(4, 3)
MATVEC(8, 2)

/* Choice c of every row through its own matrix of the stack: x row c / share, y row c. */
KERNEL_OF(WARPS* LANES, 8)
void matvec_experts(GLOBAL const uchar* w, const ulong total, GLOBAL const float* bias, GLOBAL float* y, X_ARGS,
                    GLOBAL const uint* grid, GLOBAL const int* experts, const int n_choices, const int share,
                    const int n_in, const int n_out, const int split) {
    LOCAL float sums[ROWS * WARPS * PAD];
    LOCAL float norm[LANE_PARTS];
    const int c = GROUP_ID(1);
    const ulong first = (ulong)experts[c] * (ulong)n_out;
    matvec(1, w, total, grid, first, xq, xd, xs, bias ? bias + first : bias, y, GROUP_ID(0), c, share, n_choices, n_in,
           n_out, split, (GLOBAL const float*)0, 0, 0.0f, sums, norm);
}

/* int8 form (unit_int8.h) of 32 values, one in each lane; `there`: whether to write. */
INLINE void quantise_lane(const float v, const ulong at, const int there, GLOBAL schar* yq, GLOBAL float* yd,
                          GLOBAL float* ys, SHARED float* part) {
    const int lane = LOCAL_ID(0);
    float top = fabs(v);
    UNROLL for (int o = 16; o > 0; o >>= 1) top = fmax(top, lane_xor(top, o, part));
    const float q = rint(v * (top > 0.0f ? 127.0f / top : 0.0f)), d = top / 127.0f;
    float sum = q;
    UNROLL for (int o = 8; o > 0; o >>= 1) sum += lane_xor(sum, o, part);
    if (!there) return;
    yq[at] = (schar)(int)q;
    if (lane % 16 == 0) ys[at / 16] = d * sum;
    if (lane == 0) yd[at / 32] = d;
}

/* act(gate) * up of one row of x, or of choice c of its experts: row c / share of x to row c of y. A group makes 32
   outputs, each 32 lanes some of them one after the other, with the same row of both matrices at once; so it can
   make their int8 form (unit_int8.h), too, where there is room for it. */
#define GATED_WARPS 8
#define OUTPUTS 32

KERNEL_OF(GATED_WARPS* LANES, UNITS == 1 ? 3 : 4)
void matvec_gated(GLOBAL const uchar* w_gate, GLOBAL const uchar* w_up, const ulong total, GLOBAL const float* bias_gate,
                  GLOBAL const float* bias_up, GLOBAL float* y, GLOBAL schar* yq, GLOBAL float* yd, GLOBAL float* ys,
                  X_ARGS, GLOBAL const uint* grid, GLOBAL const int* experts, const int share, const int n_in,
                  const int n_out, const int kind, SQUARES) {
    LOCAL float sums[2 * OUTPUTS * PAD];
    LOCAL float norm[LANE_PARTS];
    LOCAL float part[GATED_WARPS * LANES];
    const int lane = LOCAL_ID(0), warp = LOCAL_ID(1), c = GROUP_ID(1), row0 = GROUP_ID(0) * OUTPUTS;
    const int last = n_out - 1 - row0, row = row0 + lane;
    const ulong first = experts ? (ulong)experts[c] * (ulong)n_out : 0, at = (ulong)c * (ulong)n_out + (ulong)row;
    const ulong start = FIRST(first + (ulong)row0, n_in);
    const float square = square_part(squares, n_squares);
    uint x_rows[MOST];
    x_rows[0] = X_FIRST(c / share, n_in);
    for (int i = warp; i < OUTPUTS; i += GATED_WARPS) {
        uint rows[ROWS];
        float acc[ROWS * MOST];
        UNROLL for (int r = 0; r < ROWS; ++r) rows[r] = (uint)(i < last ? i : last);
        add_row(1, w_gate, total, grid, w_up, start, rows, xq, xd, xs, x_rows, n_in, 0, acc);
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const float sum = lanes_sum(acc[r]);
            if (lane < LANE_PARTS) sums[(r * OUTPUTS + i) * PAD + lane] = sum;
        }
    }
    const float square_sum = lanes_sum(square);
    if (warp == 0 && lane < LANE_PARTS) norm[lane] = square_sum;
    BARRIER();
    /* Now lane i of each warp has output i, and the first warp writes. */
    const float shrink = shrink_of(squares, norm, n_in, eps);
    float gate = 0.0f, up = 0.0f, v = 0.0f;
    for (int l = 0; l < LANE_PARTS; ++l) {
        gate += sums[lane * PAD + l];
        up += sums[(OUTPUTS + lane) * PAD + l];
    }
    gate *= shrink;
    up *= shrink;
    if (row < n_out) {
        if (bias_gate) gate += bias_gate[first + (ulong)row];
        if (bias_up) up += bias_up[first + (ulong)row];
        v = gated(gate, up, kind);
        if (warp == 0) y[at] = v;
    }
    quantise_lane(v, at, yq && warp == 0 && row < n_out, yq, yd, ys, part);
}

/* Half of a block without its norm: sum = x + scale * (W h + bias), for one row, and of it what a norm with `weight`
   will divide: y = sum * weight with its int8 form, and the sum of squares of each 32 (see SQUARES). A group makes 32
   outputs; n_out is a multiple of 32. */
#define ADD_WARPS 16 /* ROWS each: as many rows as OUTPUTS */

KERNEL_OF(ADD_WARPS* LANES, 1)
void matvec_add(GLOBAL const uchar* w, const ulong total, GLOBAL const float* bias, GLOBAL const float* x,
                GLOBAL const float* weight, GLOBAL float* sum, GLOBAL float* y, GLOBAL schar* yq, GLOBAL float* yd,
                GLOBAL float* ys, GLOBAL float* square_sums, X_ARGS, GLOBAL const uint* grid, const int n_in,
                const float scale) {
    LOCAL float sums[OUTPUTS * PAD];
    LOCAL float part[ADD_WARPS * LANES];
    const int lane = LOCAL_ID(0), warp = LOCAL_ID(1), row0 = GROUP_ID(0) * OUTPUTS, row = row0 + lane;
    const ulong start = FIRST((ulong)row0, n_in);
    const float before = x[row], factor = weight[row];
    uint x_rows[MOST], rows[ROWS];
    float acc[ROWS * MOST];
    x_rows[0] = 0;
    UNROLL for (int r = 0; r < ROWS; ++r) rows[r] = (uint)(warp * ROWS + r);
    add_row(1, w, total, grid, w, start, rows, xq, xd, xs, x_rows, n_in, 0, acc);
    UNROLL for (int r = 0; r < ROWS; ++r) {
        const float lane_sum = lanes_sum(acc[r]);
        if (lane < LANE_PARTS) sums[(warp * ROWS + r) * PAD + lane] = lane_sum;
    }
    BARRIER();
    float v = bias ? bias[row] : 0.0f;
    for (int l = 0; l < LANE_PARTS; ++l) v += sums[lane * PAD + l];
    v = before + scale * v;
    if (warp == 0) {
        sum[row] = v;
        y[row] = v * factor;
    }
    float square = v * v;
    UNROLL for (int o = 16; o > 0; o >>= 1) square += lane_xor(square, o, part);
    if (warp == 0 && lane == 0) square_sums[GROUP_ID(0)] = square;
    quantise_lane(v * factor, (ulong)row, yq && warp == 0, yq, yd, ys, part);
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
