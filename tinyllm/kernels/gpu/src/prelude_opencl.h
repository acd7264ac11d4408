/* The words that the kernels are written in, for OpenCL C 1.2 and later. prelude_cuda.h has the same ones. */
typedef char schar;
#define KERNEL __kernel
/* Groups of so many threads; CUDA is told how many of them are to run on a core at once. */
#define KERNEL_OF(threads, groups) KERNEL
#define GLOBAL __global
#define LOCAL __local
/* LOCAL declares memory of the group, SHARED stands before a pointer to it. */
#define SHARED __local
#define INLINE static inline
#ifdef CPU_DEVICE /* the compiler of a CPU driver decides for itself */
#define UNROLL
#else
#define UNROLL _Pragma("unroll")
#endif
#define BARRIER() barrier(CLK_LOCAL_MEM_FENCE)
#define BARRIER_GLOBAL() barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE)
#define LOCAL_ID(d) ((int)get_local_id(d))
#define LOCAL_SIZE(d) ((int)get_local_size(d))
#define GROUP_ID(d) ((int)get_group_id(d))
#define GLOBAL_ID(d) ((int)get_global_id(d))
#define ATOMIC_ADD(p, v) atomic_add((p), (v))
#define POPCOUNT(x) popcount((uint)(x))
#define FLOAT_BITS(x) as_uint(x)
#define BITS_FLOAT(x) as_float((uint)(x))

INLINE float half_at(GLOBAL const ushort* p) {
    return vload_half(0, (GLOBAL const half*)p);
}

INLINE float half_bits(const uint bits) {
    const ushort h = (ushort)bits;
    return vload_half(0, (const half*)&h);
}

INLINE void half_store(GLOBAL ushort* p, const float x) {
    vstore_half_rte(x, 0, (GLOBAL half*)p);
}

/* c + the dot product of the four signed bytes of a and of b. */
INLINE int dot4(const int a, const int b, const int c) {
#if defined(cl_khr_integer_dot_product) && defined(__opencl_c_integer_dot_product_input_4x8bit_packed)
    return c + dot_4x8packed_ss_int(as_uint(a), as_uint(b));
#else
    const char4 x = as_char4(a), y = as_char4(b);
    return c + x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
#endif
}

/* What is read once: CUDA keeps it out of the nearest cache. */
INLINE uint4 stream16(GLOBAL const uchar* p) {
    return *(GLOBAL const uint4*)p;
}

/* x of the thread whose number differs in the bits of `mask` (below 32); every thread of the group takes part.
   `part` has room for one value of each. */
INLINE float lane_xor(const float x, const int mask, SHARED float* part) {
    const int i = LOCAL_ID(0) + LOCAL_SIZE(0) * LOCAL_ID(1);
    part[i] = x;
    BARRIER();
    const float y = part[i ^ mask];
    BARRIER();
    return y;
}

/* The sum over 32 neighbours, in LANE_PARTS parts: each lane's own. */
#define LANE_PARTS 32
INLINE float lanes_sum(const float x) {
    return x;
}

/* Four bytes of the eight in lo and hi, chosen by the four low nibbles (0 to 7) of pick. */
INLINE uint byte_pick(const uint lo, const uint hi, const uint pick) {
    uint out = 0;
    for (int i = 0; i < 4; ++i) {
        const uint n = (pick >> (4 * i)) & 7;
        out |= (((n & 4 ? hi : lo) >> (8 * (n & 3))) & 255u) << (8 * i);
    }
    return out;
}
