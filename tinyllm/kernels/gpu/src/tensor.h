/* Words for what the 32 lanes of a warp do together, on CUDA: matrix products, and values of other lanes.

   A group is one-dimensional, and all its threads come to each of these words. Pairs of halves are one uint, the
   first in its low bits. With lane = 4 g + t, `mma` multiplies a [16, 16] and b [16, 8], which lie in the lanes as
   the PTX manual says (section "Matrix fragments for mma.m16n8k16 with floating point type"):

   a[0], a[1], a[2], a[3]   rows g, g + 8, g, g + 8; columns 2t and 2t + 1, for a[2] and a[3] 2t + 8 and 2t + 9
   b[0], b[1]               column g; rows 2t and 2t + 1, for b[1] 2t + 8 and 2t + 9
   c[0], c[1], c[2], c[3]   rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1

   WARP_ROOM, WARP_ARGS and WARP_PASS are for a device that has to act this out in local memory. */
#define WARP_ROOM(warps)
#define WARP_ARGS
#define WARP_PASS
/* A core has room for three groups of 48 KB of local memory. */
#define LARGE_LOCAL (__CUDA_ARCH__ / 100 == 9 || __CUDA_ARCH__ / 100 == 10)
#define DEVICE_FENCE() __threadfence()
#define N_GROUPS(d) PICK(gridDim, d)

/* c += a b, in float. */
INLINE void mma(float* c, const uint* a, const uint* b) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    UNROLL for (int i = 0; i < 2; ++i)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#endif
}

/* Four matrices [8, 8] of halves: lane i names row i % 8 of matrix i / 8 (16 aligned bytes), and gets of each
   matrix m the values 2t and 2t + 1 of row g in r[m]. */
INLINE void load_tiles(uint* r, const ushort* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint)__cvta_generic_to_shared(row))
                 : "memory");
}

/* The same with each matrix transposed: rows 2t and 2t + 1 of column g. */
INLINE void load_tiles_transposed(uint* r, const ushort* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint)__cvta_generic_to_shared(row))
                 : "memory");
}

/* 16 aligned bytes to local memory, on their way until copies_done(), which waits for this thread's. */
INLINE void copy16(ushort* to, const uchar* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"((uint)__cvta_generic_to_shared(to)), "l"(from) : "memory");
#else
    *(uint4*)to = *(const uint4*)from;
#endif
}

INLINE void copies_done() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}

/* x of the lane whose number differs in the bits of `mask`. */
INLINE float lane_xor(const float x, const int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

/* Two floats as halves. */
INLINE uint half2_of(const float lo, const float hi) {
    uint r;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(lo), "f"(hi));
#else
    asm("{.reg .b16 x, y; cvt.rn.f16.f32 x, %1; cvt.rn.f16.f32 y, %2; mov.b32 %0, {x, y};}" : "=r"(r) : "f"(lo), "f"(hi));
#endif
    return r;
}

/* a b + c in each half. */
INLINE uint half2_fma(const uint a, const uint b, const uint c) {
    uint r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

INLINE uint half2_add(const uint a, const uint b) {
    uint r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

/* 16 aligned bytes to local memory, or zeros unless `there`: on their way, one of this thread's copies since the last
   copies_commit(). */
INLINE void copy16_or_zeros(ushort* to, const uchar* from, const int there) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"((uint)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
#else
    *(uint4*)to = there ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
#endif
}

INLINE void copies_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

/* Until this thread's copies are done, but for those of the last `newer` commits: a number the compiler knows. */
INLINE void copies_wait([[maybe_unused]] const int newer) {
#if __CUDA_ARCH__ >= 800
    if (newer)
        asm volatile("cp.async.wait_group 1;" : : : "memory");
    else
        asm volatile("cp.async.wait_group 0;" : : : "memory");
#endif
}

/* Four or two floats that another group has written. */
INLINE void load4_fresh(float* v, const float* p) {
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                 : "l"(p)
                 : "memory");
}

INLINE void load2_fresh(float* v, const float* p) {
    asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "l"(p) : "memory");
}

/* 2 to the power of x and 1 / x, to 22 bits. */
INLINE float exp2_fast(const float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE float reciprocal(const float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
