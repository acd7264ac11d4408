/* New keys or values into the cache, and moved ones out of it. */

/* Keys x [T, heads * d] to positions of the sequences seqs [T], and in groups with GROUP_ID(1) = 1 values the same
   way; one thread for each piece. */
KERNEL void cache_write(GLOBAL const float* k, GLOBAL const float* v, GLOBAL uchar* store, GLOBAL const int* pages,
                        GLOBAL const int* seqs, GLOBAL const int* positions, const ulong page_bytes,
                        const ulong k_offset, const ulong v_offset, const int n_pages, const int heads, const int k_d,
                        const int v_d, const int k_width, const int v_width, const int n_rows) {
    const int i = GLOBAL_ID(0), is_v = GROUP_ID(1);
    const int d = is_v ? v_d : k_d, width = is_v ? v_width : k_width, pieces = width / KV_PIECE;
    if (i >= n_rows * heads * pieces) return;
    const int p = i % pieces, h = i / pieces % heads, t = i / (pieces * heads), pos = positions[t];
    GLOBAL uchar* base = page_of(store, page_bytes, is_v ? v_offset : k_offset, pages, n_pages, seqs[t], pos);
    GLOBAL const float* x = (is_v ? v : k) + ((ulong)t * heads + h) * (ulong)d;
    kv_store(base, heads * PAGE, h * PAGE + pos % PAGE, width, p, d, x);
}

/* Positions first .. first + n of one sequence as float [n, heads * d]. */
KERNEL void cache_read(GLOBAL uchar* store, GLOBAL const int* pages, GLOBAL float* y, const ulong page_bytes,
                       const ulong offset, const int first, const int heads, const int d, const int width,
                       const int count) {
    const int i = GLOBAL_ID(0);
    if (i >= count) return;
    const int h = i / d % heads, pos = first + i / (d * heads);
    GLOBAL const uchar* base = page_of(store, page_bytes, offset, pages, 0, 0, pos);
    y[i] = kv_load(base, heads * PAGE, h * PAGE + pos % PAGE, width, i % d);
}
