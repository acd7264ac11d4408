/* Flash attention on tensor cores (tensor.h), over keys and values stored as halves or as q8_0 codes in pages (kv.h).

   As attention.c, a group looks after a tile of (row, head) pairs that share a key head, KEYS keys at a time, and the
   keys are dealt over GROUP_ID(2) = 0 .. splits - 1. Of the group's warps, ROW_WARPS look after 16 pairs each, and
   KEY_WARPS share the keys of a tile for the same pairs: 1 x 4 where a sequence has one row, 8 x 1 where it has many.
   With splits > 1 the group that comes last joins the parts: no other launch follows.

   Queries and softmax weights go in as two halves each, what the first lost in the second: 22 bits, as good as float.
   Codes become halves in registers, exactly; a block's scale is multiplied with the score or with the weight.
   Scores are in units of log 2. A sum and its values count in units of exp2(-top), where top is the largest score less
   HEADROOM, so that small weights are no subnormal halves. */
#define ITEM (KV == 1 ? 2 : 1) /* bytes */
#define CHUNKS(d) (((d) + KV_PIECE - 1) / KV_PIECE * KV_PIECE * ITEM / 16) /* 16 bytes each, of a stored row */
#define STRIDE(d) ((CHUNKS(d) | 1) * 8) /* of a row in local memory: eight rows lie in different banks */
#define TILE (KEYS * (STRIDE(HEAD_DIM) + STRIDE(HEAD_DIM_V)))
#define MEETING (KEY_WARPS > 1 ? KEY_WARPS * PAIRS * PITCH * 2 : 0)
#define ROOM (TILE > MEETING ? TILE : MEETING) /* ushorts */
#define STEPS (HEAD_DIM / 16)
#define WARP_KEYS (KEYS / KEY_WARPS)
#define N_SCORES (WARP_KEYS / 8)
#define Q_STRIDE (HEAD_DIM + 8)
#define Q_ROOM (2 * PAIRS * Q_STRIDE) /* ushorts, for both terms */
#define BLOCKS(d) (((d) + 31) / 32)
#define GROUPS (KEY_WARPS < 4 ? 256 / THREADS : LARGE_LOCAL ? 3 : 2) /* of a core: registers are for so many */
#define HEADROOM (KV == 1 ? 15.0f : 4.0f) /* a half ends at 2^16; with q8_0 the scale has to fit, too */

/* The queries: in local memory where warps share them, in registers where they fit, else read again for each tile. */
#if KEY_WARPS > 1 && 2 * (ROOM + Q_ROOM) <= 46 << 10
#define Q_LOCAL
#elif HEAD_DIM <= 128
#define Q_REGISTERS
#endif
#if defined Q_REGISTERS || defined Q_LOCAL && KV == 1
#define EACH_STEP UNROLL
#else
#define EACH_STEP /* not unrolled: there would be too much in registers */
#endif

#if KV == 2 /* columns as in DIM_OF */
#define FIRST_DIM(t) (4 * (t))
#define SECOND_DIM(t) (4 * (t) + 2)
#define COLUMN_OF(d) ((d) / 16 * 16 + (d) % 16 / 4 * 2 + (d) % 2 + (d) % 4 / 2 * 8)
#else
#define FIRST_DIM(t) (2 * (t))
#define SECOND_DIM(t) (2 * (t) + 8)
#define COLUMN_OF(d) (d)
#endif

/* A byte below 0x64 is the half 1024 + the byte: codes plus 128, less 1152. */
INLINE uint codes_to_halves(const uint codes, const uint pick) {
    return half2_add(byte_pick(codes ^ 0x80808080u, 0x64646464u, pick), 0xe480e480u);
}

/* Two floats as two pairs of halves whose sum they are. */
#define split2(x, y, high, low) *(high) = half2_of(x, y), *(low) = lost2(x, y, *(high))
INLINE uint lost2(const float x, const float y, const uint high) {
    return half2_of(x - half_bits(high & 0xffffu), y - half_bits(high >> 16));
}

/* Start copying `rows` rows of stored bytes to local memory, with zeros for those from n on. */
INLINE void stage(SHARED ushort* to, GLOBAL const uchar* from, const int rows, const int chunks, const int stride,
                  const int n) {
    const int tid = LOCAL_ID(0), even = THREADS % chunks == 0; /* then addresses are constants apart */
    const int left = n - tid / chunks;
    to += tid / chunks * stride + tid % chunks * 8;
    from += (uint)tid * 16;
    UNROLL for (int j = 0; j < (rows * chunks + THREADS - 1) / THREADS; ++j) {
        const int i = tid + j * THREADS;
        const int down = even ? j * (THREADS / chunks) : i / chunks - tid / chunks;
        const int along = even ? 0 : i % chunks - tid % chunks;
        if (rows * chunks % THREADS == 0 || i < rows * chunks)
            copy16_or_zeros(to + down * stride + along * 8, from + j * THREADS * 16, down < left);
    }
}

/* Start copying the keys or values of one head from key k0 on; q8_0's scales go to `scales`. */
INLINE void stage_tile(SHARED ushort* to, SHARED ushort* scales, GLOBAL const uchar* side, const int n_head_kv,
                       const int kv_head, const int k0, const int dim, const int n) {
    const int chunks = CHUNKS(dim), row = kv_head * PAGE + k0 % PAGE;
    stage(to, side + (uint)(row * chunks * 16), KEYS, chunks, STRIDE(dim), n);
#if KV == 2
    stage(scales, side + (uint)(n_head_kv * PAGE * chunks * 16 + row * BLOCKS(dim) * 2), 1, KEYS * BLOCKS(dim) / 8, 0,
          THREADS);
#endif
    copies_commit();
}

/* 16 values of the queries of two pairs, or zeros (at = -1), as the left side of a product. */
INLINE void query_tile(GLOBAL const float* q, SHARED const int* at, const int step, const float scale, uint* high,
                       uint* low) {
    const int t = LOCAL_ID(0) % 4;
    UNROLL for (int i = 0; i < 4; ++i) {
        const int a = at[i % 2 * 8], d = 16 * step + (i < 2 ? FIRST_DIM(t) : SECOND_DIM(t));
        GLOBAL const float* x = q + ((uint)a * HEAD_DIM + (uint)d);
        split2(a >= 0 ? x[0] * scale : 0.0f, a >= 0 ? x[1] * scale : 0.0f, high + i, low + i);
    }
}

/* How many positions back from i a query there sees, itself included; below 0 windows are chunks. */
INLINE int reach(const int i, const int window) { return window < 0 ? i % -window + 1 : window; }

/* Scores of a masked or biased tile: k0 is the first of the thread's keys. Nothing here is kept in registers from tile
   to tile. A key is seen if it is less than `seen` behind; one ahead is very far behind as an unsigned number. */
INLINE void mask(float* s, SHARED const Part* p, const int i0, const int k0, GLOBAL const float* slopes) {
    UNROLL for (int h = 0; h < 2; ++h) {
        const uint seen = p->window ? (uint)reach(p->pos[i0 + 8 * h], p->window) : 1u << 31;
        const int behind = p->pos[i0 + 8 * h] - k0;
        const float slope = slopes ? slopes[p->head[i0 + 8 * h]] * LOG2E : 0.0f;
        UNROLL for (int n = 0; n < 2 * N_SCORES; ++n) {
            const int key = n / 2 * 8 + n % 2, at = n / 2 * 4 + 2 * h + n % 2;
            const float biased = s[at] + slope * ((float)key - (float)behind);
            s[at] = (uint)(behind - key) < seen ? biased : LOWEST;
        }
    }
}

/* cap * tanh of what was multiplied with 2 log2(e) / cap. */
INLINE float capped(const float s, const float cap) {
    return cap * LOG2E * (1.0f - 2.0f * reciprocal(exp2_fast(s) + 1.0f));
}

#ifdef Q_LOCAL
/* The queries of a group as two terms in local memory, columns in the order of FIRST_DIM and SECOND_DIM. */
#define Q_LOADS (PAIRS * HEAD_DIM / 2 / THREADS) /* of two values, of a thread */
INLINE void share_queries(GLOBAL const float* q, SHARED const Part* p, const float scale, SHARED ushort* to) {
    float x[2 * Q_LOADS];
    UNROLL for (int j = 0; j < Q_LOADS; ++j) { /* all on their way before the first is waited for */
        const int i = LOCAL_ID(0) + j * THREADS, at = p->at[i / (HEAD_DIM / 2)];
        GLOBAL const float* from = q + ((uint)at * HEAD_DIM + (uint)(i % (HEAD_DIM / 2) * 2));
        x[2 * j] = at >= 0 ? from[0] * scale : 0.0f;
        x[2 * j + 1] = at >= 0 ? from[1] * scale : 0.0f;
    }
    UNROLL for (int j = 0; j < Q_LOADS; ++j) {
        const int i = LOCAL_ID(0) + j * THREADS, d = i % (HEAD_DIM / 2) * 2;
        SHARED uint* at = (SHARED uint*)(to + i / (HEAD_DIM / 2) * Q_STRIDE + COLUMN_OF(d));
        split2(x[2 * j], x[2 * j + 1], at, at + PAIRS * Q_STRIDE / 2);
    }
}
#define QUERY_OF_STEP                        \
    uint q_high[4], q_low[4];                \
    load_tiles(q_high, shared_q + 16 * step); \
    load_tiles(q_low, shared_q + PAIRS * Q_STRIDE + 16 * step);
#elif defined Q_REGISTERS
#define QUERY_OF_STEP const uint *q_high = high + 4 * step, *q_low = low + 4 * step;
#else
#define QUERY_OF_STEP         \
    uint q_high[4], q_low[4]; \
    query_tile(q, at, step, scale, q_high, q_low);
#endif

/* Scores of 16 pairs and N_SCORES times eight keys from ks on, with the queries from the one place where they are. */
INLINE void tile_scores(float* s, SHARED const ushort* ks, SHARED const ushort* scales, SHARED const ushort* shared_q,
                        const uint* high, const uint* low, GLOBAL const float* q, SHARED const int* at,
                        const float scale WARP_ARGS) {
    const int lane = LOCAL_ID(0) % 32;
    SHARED const ushort* row = ks + (lane / 16 * 8 + lane % 8) * STRIDE(HEAD_DIM) + lane / 8 % 2 * 8;
    UNROLL for (int i = 0; i < 4 * N_SCORES; ++i) s[i] = 0.0f;
#if KV == 2
    EACH_STEP for (int block = 0; block < BLOCKS(HEAD_DIM); ++block) {
        UNROLL for (int n = 0; n < N_SCORES; n += 2) {
            uint codes[4];
            float part[8];
            load_tiles(codes, row + 8 * n * STRIDE(HEAD_DIM) + 16 * block);
            UNROLL for (int i = 0; i < 8; ++i) part[i] = 0.0f;
            UNROLL for (int i = 0; i < 2; ++i) {
                const int step = 2 * block + i;
                if (step >= STEPS) continue;
                QUERY_OF_STEP
                UNROLL for (int m = 0; m < 2; ++m) {
                    uint k[2];
                    k[0] = codes_to_halves(codes[2 * m + i], 0x4140u);
                    k[1] = codes_to_halves(codes[2 * m + i], 0x4342u);
                    mma(part + 4 * m, q_high, k);
                    mma(part + 4 * m, q_low, k);
                }
            }
            UNROLL for (int i = 0; i < 8; ++i) {
                const int key = 8 * (n + i / 4) + 2 * (lane % 4) + i % 2;
                s[4 * n + i] += part[i] * half_bits(scales[key * BLOCKS(HEAD_DIM) + block]);
            }
        }
    }
#else
    float rest[4 * N_SCORES], *low_s = N_SCORES > 2 ? s : rest; /* few sums: shorter chains of products that wait */
    UNROLL for (int i = 0; i < 4 * N_SCORES; ++i) rest[i] = 0.0f;
    EACH_STEP for (int step = 0; step < STEPS; ++step) {
        QUERY_OF_STEP
        UNROLL for (int n = 0; n < N_SCORES; n += 2) {
            uint k[4];
            load_tiles(k, row + 8 * n * STRIDE(HEAD_DIM) + 16 * step);
            mma(s + 4 * n, q_high, k);
            mma(s + 4 * n + 4, q_high, k + 2);
            mma(low_s + 4 * n, q_low, k);
            mma(low_s + 4 * n + 4, q_low, k + 2);
        }
    }
    UNROLL for (int i = 0; i < 4 * N_SCORES; ++i) s[i] += rest[i];
#endif
}

/* Scores become weights; what was summed so far shrinks where a larger score has come. A lane sums its own keys. */
INLINE void soften(float* s, float* o, float* top, float* sum WARP_ARGS) {
    UNROLL for (int h = 0; h < 2; ++h) {
        float most = LOWEST;
        UNROLL for (int n = 0; n < N_SCORES; ++n) most = fmax(most, fmax(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
        most = fmax(most, lane_xor(most, 1));
        most = fmax(fmax(most, lane_xor(most, 2)) - HEADROOM, top[h]);
        const float shrink = exp2_fast(top[h] - most), unit = most > 0.5f * LOWEST ? most : 0.0f;
        top[h] = most;
        sum[h] *= shrink;
        UNROLL for (int n = 0; n < N_SCORES; ++n) {
            UNROLL for (int i = 4 * n + 2 * h; i < 4 * n + 2 * h + 2; ++i) {
                s[i] = exp2_fast(s[i] - unit);
                sum[h] += s[i];
            }
        }
        if (shrink < 1.0f) {
            UNROLL for (int n = 0; n < N_VALUES; ++n) {
                o[4 * n + 2 * h] *= shrink;
                o[4 * n + 2 * h + 1] *= shrink;
            }
        }
    }
}

/* o += weights times the values from vs on. */
INLINE void add_values(float* o, const float* s, SHARED const ushort* vs,
                       SHARED const ushort* scales WARP_ARGS) {
    const int lane = LOCAL_ID(0) % 32;
    SHARED const ushort* row = vs + (lane / 8 % 2 * 8 + lane % 8) * STRIDE(HEAD_DIM_V) + lane / 16 * 8;
    UNROLL for (int keys = 0; keys < WARP_KEYS; keys += 16) {
        const float* p = s + keys / 2;
        uint high[4], low[4], v[4];
#if KV == 2
        UNROLL for (int block = 0; block < BLOCKS(HEAD_DIM_V); ++block) {
            float d[4];
            UNROLL for (int i = 0; i < 4; ++i)
                d[i] = half_bits(scales[(keys + 2 * (lane % 4) + i % 2 + i / 2 * 8) * BLOCKS(HEAD_DIM_V) + block]);
            UNROLL for (int i = 0; i < 4; ++i)
                split2(p[2 * i] * d[i / 2 * 2], p[2 * i + 1] * d[i / 2 * 2 + 1], high + i, low + i);
            load_tiles_transposed(v, row + keys * STRIDE(HEAD_DIM_V) + 16 * block);
            UNROLL for (int i = 0; i < 4; ++i) {
                const int tile = 4 * block + i;
                if (tile >= N_VALUES) continue;
                uint pair[2];
                pair[0] = codes_to_halves(v[i / 2 * 2], i % 2 ? 0x4341u : 0x4240u);
                pair[1] = codes_to_halves(v[i / 2 * 2 + 1], i % 2 ? 0x4341u : 0x4240u);
                mma(o + 4 * tile, high, pair);
                mma(o + 4 * tile, low, pair);
            }
        }
#else
        UNROLL for (int i = 0; i < 4; ++i) split2(p[2 * i], p[2 * i + 1], high + i, low + i);
        UNROLL for (int tile = 0; tile < N_VALUES; tile += 2) {
            load_tiles_transposed(v, row + keys * STRIDE(HEAD_DIM_V) + 8 * tile);
            mma(o + 4 * tile, high, v);
            mma(o + 4 * tile + 4, high, v + 2);
            mma(o + 4 * tile, low, v);
            mma(o + 4 * tile + 4, low, v + 2);
        }
#endif
    }
}

/* tiles [n_tiles][3]: sequence, first row, number of rows; NULL where each sequence has one row. `arrived` counts, for
   each tile and key head, the groups that are done; it is all zeros before and after. The rest: as in attention.c. */
KERNEL_OF(THREADS, GROUPS) void attention_tensor(GLOBAL const float* q, GLOBAL uchar* store, GLOBAL const int* pages,
                             const ulong page_bytes, const ulong k_offset, const ulong v_offset, const int n_pages,
                             GLOBAL float* out, GLOBAL int* xq, GLOBAL float* xd, GLOBAL float* xs,
                             GLOBAL float* parts, GLOBAL int* arrived, GLOBAL const float* slopes,
                             GLOBAL const float* sinks, GLOBAL const int* tiles, GLOBAL const int* starts,
                             GLOBAL const int* n_past, const int n_tiles, const int n_head_kv, const int per_key,
                             const int chunks, const int heads_at_once, const int splits, const float scale, const int window,
                             const float softcap) {
    WARP_ROOM(WARPS)
    LOCAL uint4 room[(ROOM + 7) / 8];
    LOCAL int last;
#ifdef Q_LOCAL
    LOCAL uint4 q_room[Q_ROOM / 8];
#endif
    SHARED ushort* ks = (SHARED ushort*)room;
    SHARED ushort* vs = ks + KEYS * STRIDE(HEAD_DIM);
#if KV == 2
    LOCAL uint4 k_room[KEYS * BLOCKS(HEAD_DIM) / 8];
    LOCAL uint4 v_room[KEYS * BLOCKS(HEAD_DIM_V) / 8];
    SHARED ushort *k_scales = (SHARED ushort*)k_room, *v_scales = (SHARED ushort*)v_room;
#else
    SHARED ushort *k_scales = ks, *v_scales = vs;
#endif
    const int lane = LOCAL_ID(0) % 32, warp = LOCAL_ID(0) / 32, first = warp / ROW_WARPS * WARP_KEYS;
    const int i0 = warp % ROW_WARPS * 16 + lane / 4, tile = n_tiles - 1 - GROUP_ID(1); /* the longest ones first */
    const int kv_head = chunks > 1 ? GROUP_ID(0) / chunks : GROUP_ID(0);
    LOCAL Part part;
    SHARED Part* p = &part;
    const int seq = tiles ? tiles[3 * tile] : tile, row0 = tiles ? tiles[3 * tile + 1] : tile;
    /* without a window this is the first page: one wait for memory less */
    const int guess = GROUP_ID(2) * KEYS / PAGE, guessed = pages[seq * n_pages + (guess < n_pages ? guess : 0)];
    const int n_rows = tiles ? tiles[3 * tile + 2] : 1, first_pos = n_past[seq] + (tiles ? row0 - starts[seq] : 0);
    if (LOCAL_ID(0) < PAIRS) {
        const int i = LOCAL_ID(0), r = heads_at_once < PAIRS ? i / heads_at_once : 0, h = (GROUP_ID(0) - kv_head * chunks) * heads_at_once + i - r * heads_at_once;
        p->head[i] = kv_head * per_key + (h < per_key ? h : 0);
        p->at[i] = r < n_rows && h < per_key ? (row0 + r) * (n_head_kv * per_key) + kv_head * per_key + h : -1;
        p->pos[i] = first_pos + r;
    }
    if (LOCAL_ID(0) == 0) {
        p->n_pairs = n_rows * heads_at_once;
        p->seq = seq;
        p->kv_head = kv_head;
        p->window = window;
        p->first_pos = first_pos;
        p->end_key = first_pos + n_rows;
    }
    BARRIER();
    Result result = {out, xq, xd, xs, parts, sinks, GROUP_ID(2), splits};

    const int seen = reach(p->first_pos, window);
    const int first_key = window && p->first_pos >= seen ? p->first_pos - seen + 1 : 0;
    int k0 = (first_key / KEYS + GROUP_ID(2)) * KEYS;
    if (k0 < p->end_key) {
        const int number = k0 / PAGE == guess ? guessed : pages[p->seq * n_pages + k0 / PAGE];
        GLOBAL uchar* page = store + (ulong)number * page_bytes;
        stage_tile(ks, k_scales, page + k_offset, n_head_kv, p->kv_head, k0, HEAD_DIM, p->end_key - k0);
        stage_tile(vs, v_scales, page + v_offset, n_head_kv, p->kv_head, k0, HEAD_DIM_V, p->end_key - k0);
    }
    const float q_scale = scale * LOG2E * (softcap != 0.0f ? 2.0f / softcap : 1.0f);
    SHARED const ushort* shared_q = 0;
#ifdef Q_LOCAL
    uint *high = 0, *low = 0;
    share_queries(q, p, q_scale, (SHARED ushort*)q_room);
    shared_q = (SHARED ushort*)q_room + (i0 - lane / 4 + lane % 16) * Q_STRIDE + lane / 16 * 8;
#else
#ifdef Q_REGISTERS
    uint high[4 * STEPS], low[4 * STEPS];
    UNROLL for (int step = 0; step < STEPS; ++step)
        query_tile(q, p->at + i0, step, q_scale, high + 4 * step, low + 4 * step);
#else
    uint *high = 0, *low = 0;
#endif
#endif
    float o[4 * N_VALUES], s[4 * N_SCORES], top[2] = {LOWEST, LOWEST}, sum[2] = {0.0f, 0.0f};
    UNROLL for (int i = 0; i < 4 * N_VALUES; ++i) o[i] = 0.0f;
    while (k0 < p->end_key) {
        const int next = k0 + splits * KEYS, more = next < p->end_key;
        const ulong page = more ? (ulong)pages[p->seq * n_pages + next / PAGE] : 0;
        copies_wait(1); /* the keys are here, the values may be on their way */
        BARRIER();
        tile_scores(s, ks + first * STRIDE(HEAD_DIM), k_scales + first * BLOCKS(HEAD_DIM), shared_q, high, low, q,
                    p->at + i0, q_scale WARP_PASS);
        BARRIER();
        if (more)
            stage_tile(ks, k_scales, store + page * page_bytes + k_offset, n_head_kv, p->kv_head, next, HEAD_DIM,
                       p->end_key - next);
        if (softcap != 0.0f) {
            UNROLL for (int i = 0; i < 4 * N_SCORES; ++i) s[i] = capped(s[i], softcap);
        }
        if (slopes || k0 + KEYS > p->first_pos + 1 || window < 0 || (window && p->end_key - k0 > window)) {
            mask(s, p, i0, k0 + first + 2 * (lane % 4), slopes);
        }
        soften(s, o, top, sum WARP_PASS);
        if (more) copies_wait(1); /* the values are here, the next keys may be on their way */
        else copies_wait(0);
        BARRIER();
#if KV == 2
        if (p->end_key - k0 < KEYS) { /* scales behind the last key may be anything, even NaN */
            for (int i = LOCAL_ID(0); i < KEYS * BLOCKS(HEAD_DIM_V); i += THREADS)
                if (i / BLOCKS(HEAD_DIM_V) >= p->end_key - k0) v_scales[i] = 0;
            BARRIER();
        }
#endif
        add_values(o, s, vs + first * STRIDE(HEAD_DIM_V), v_scales + first * BLOCKS(HEAD_DIM_V) WARP_PASS);
        BARRIER();
        if (more)
            stage_tile(vs, v_scales, store + page * page_bytes + v_offset, n_head_kv, p->kv_head, next, HEAD_DIM_V,
                       p->end_key - next);
        k0 = next;
    }
    UNROLL for (int h = 0; h < 2; ++h) {
        sum[h] += lane_xor(sum[h], 1);
        sum[h] += lane_xor(sum[h], 2);
    }
#if KEY_WARPS > 1
    meet(o, top, sum, p, &result, i0, warp / ROW_WARPS, (SHARED float*)room WARP_PASS);
#else
    keep_registers(o, top, sum, p, &result, i0);
#endif
    if (splits == 1) return;
    const int which = GROUP_ID(1) * (n_head_kv * chunks) + GROUP_ID(0);
    DEVICE_FENCE();
    BARRIER_GLOBAL();
    if (LOCAL_ID(0) == 0) last = ATOMIC_ADD(arrived + which, 1) == splits - 1;
    BARRIER();
    if (!last) return;
    DEVICE_FENCE();
    if (LOCAL_ID(0) == 0) arrived[which] = 0;
    result.splits = 1;
    join(p, &result, splits WARP_PASS);
}
