/* Stored keys and values: pages of PAGE positions. A page holds, for each layer, its keys and then its values:
   [heads][PAGE][width], width being head_dim rounded up to whole pieces of PIECE values.

   KV is 0 for float, 1 for half, 2 for q8_0: codes of all rows, then a half-float scale for each 32 of them. */
#define PAGE 64
#define KV_PIECE (KV == 2 ? 32 : 4)

/* Byte address of one layer's keys or values: of the page of position `pos` of sequence s. */
INLINE GLOBAL uchar* page_of(GLOBAL uchar* store, const ulong page_bytes, const ulong offset, GLOBAL const int* pages,
                             const int n_pages, const int s, const int pos) {
    return store + (ulong)pages[s * n_pages + pos / PAGE] * page_bytes + offset;
}

/* Four values from d on of row r (head * PAGE + position % PAGE); rows in all. */
INLINE float4 kv_load4(GLOBAL const uchar* base, const int rows, const int r, const int width, const int d) {
    float4 v;
    const ulong i = (ulong)r * (ulong)width + (ulong)d;
#if KV == 0
    v = *((GLOBAL const float4*)base + i / 4);
#elif KV == 1
    const uint2 bits = *((GLOBAL const uint2*)base + i / 4);
    v.x = half_bits(bits.x & 0xffffu);
    v.y = half_bits(bits.x >> 16);
    v.z = half_bits(bits.y & 0xffffu);
    v.w = half_bits(bits.y >> 16);
#else
    const uint q = *((GLOBAL const uint*)base + i / 4);
    const float scale = half_at((GLOBAL const ushort*)(base + (ulong)rows * (ulong)width) + i / 32);
    v.x = scale * (float)(schar)(q & 255u);
    v.y = scale * (float)(schar)((q >> 8) & 255u);
    v.z = scale * (float)(schar)((q >> 16) & 255u);
    v.w = scale * (float)(schar)(q >> 24);
#endif
    return v;
}

/* One value. */
INLINE float kv_load(GLOBAL const uchar* base, const int rows, const int r, const int width, const int d) {
    const ulong i = (ulong)r * (ulong)width + (ulong)d;
#if KV == 0
    return ((GLOBAL const float*)base)[i];
#elif KV == 1
    return half_at((GLOBAL const ushort*)base + i);
#else
    return (float)((GLOBAL const schar*)base)[i] *
           half_at((GLOBAL const ushort*)(base + (ulong)rows * (ulong)width) + i / 32);
#endif
}

/* Store piece p of row r from x, whose values from d_end on are padding. */
INLINE void kv_store(GLOBAL uchar* base, const int rows, const int r, const int width, const int p, const int d_end,
                     GLOBAL const float* x) {
    const ulong i = (ulong)r * (ulong)width + (ulong)(p * KV_PIECE);
    const int left = d_end - p * KV_PIECE;
#if KV == 2
    float top = 0.0f;
    for (int j = 0; j < 32 && j < left; ++j) top = fmax(top, fabs(x[p * 32 + j]));
    const float d = top / 127.0f, inverse = d > 0.0f ? 1.0f / d : 0.0f;
    for (int j = 0; j < 32; ++j)
        ((GLOBAL schar*)base)[i + j] = (schar)(j < left ? (int)rint(x[p * 32 + j] * inverse) : 0);
    half_store((GLOBAL ushort*)(base + (ulong)rows * (ulong)width) + i / 32, d);
#else
    for (int j = 0; j < 4; ++j) {
        const float v = j < left ? x[p * 4 + j] : 0.0f;
#if KV == 1
        half_store((GLOBAL ushort*)base + i + j, v);
#else
        ((GLOBAL float*)base)[i + j] = v;
#endif
    }
#endif
}

/* Value d of row r; `top` is the largest magnitude among the 32 values that share its scale. */
INLINE void kv_store_value(GLOBAL uchar* base, const int rows, const int r, const int width, const int d, const float v,
                           const float top) {
    const ulong i = (ulong)r * (ulong)width + (ulong)d;
#if KV == 0
    ((GLOBAL float*)base)[i] = v;
#elif KV == 1
    half_store((GLOBAL ushort*)base + i, v);
#else
    const float scale = top / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    ((GLOBAL schar*)base)[i] = (schar)(int)rint(v * inverse);
    if (d % 32 == 0) half_store((GLOBAL ushort*)(base + (ulong)rows * (ulong)width) + i / 32, scale);
#endif
}
