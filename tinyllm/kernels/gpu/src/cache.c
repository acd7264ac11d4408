/* New keys or values into the cache, and moved ones out of it. */

/* x [T, heads * d] to positions of the sequences seqs [T]; one thread for each piece. */
KERNEL void cache_write(GLOBAL const float* x, GLOBAL uchar* store, GLOBAL const int* pages, GLOBAL const int* seqs,
                        GLOBAL const int* positions, const ulong page_bytes, const ulong offset, const int n_pages,
                        const int heads, const int d, const int width, const int count) {
    const int i = GLOBAL_ID(0), pieces = width / KV_PIECE;
    if (i >= count) return;
    const int p = i % pieces, h = i / pieces % heads, t = i / (pieces * heads), pos = positions[t];
    GLOBAL uchar* base = page_of(store, page_bytes, offset, pages, n_pages, seqs[t], pos);
    kv_store(base, heads * PAGE, h * PAGE + pos % PAGE, width, p, d, x + ((ulong)t * heads + h) * (ulong)d);
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
