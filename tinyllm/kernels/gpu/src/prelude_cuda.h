/* The words that the kernels are written in, for CUDA. prelude_opencl.h has the same ones. No header is needed,
   so NVRTC compiles them on a machine with nothing but the driver. */
typedef signed char schar;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long long ulong;
#define KERNEL extern "C" __global__
/* Groups of so many threads. Where memory is fastest beside the cores (A100, H100, H200), registers are rationed so
   that so many groups run on a core at once. */
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900)
#define KERNEL_OF(threads, groups) KERNEL __launch_bounds__(threads, groups)
#else
#define KERNEL_OF(threads, groups) KERNEL __launch_bounds__(threads, 1) /* as many as it wants */
#endif
#define GLOBAL
#define LOCAL __shared__
/* LOCAL declares memory of the group, SHARED stands before a pointer to it. */
#define SHARED
#define INLINE [[maybe_unused]] static __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define BARRIER() __syncthreads()
#define PICK(v, d) ((d) == 0 ? (int)v.x : (d) == 1 ? (int)v.y : (int)v.z)
#define BARRIER_GLOBAL() __syncthreads()
#define LOCAL_ID(d) PICK(threadIdx, d)
#define LOCAL_SIZE(d) PICK(blockDim, d)
#define GROUP_ID(d) PICK(blockIdx, d)
#define GLOBAL_ID(d) (GROUP_ID(d) * LOCAL_SIZE(d) + LOCAL_ID(d))
#define ATOMIC_ADD(p, v) atomicAdd((p), (v))
#define POPCOUNT(x) __popc((uint)(x))
#define FLOAT_BITS(x) __float_as_uint(x)
#define BITS_FLOAT(x) __uint_as_float((uint)(x))

INLINE float half_bits(const uint bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((ushort)bits));
    return x;
}

INLINE float half_at(const ushort* p) {
    return half_bits(*p);
}

INLINE void half_store(ushort* p, const float x) {
    ushort bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    *p = bits;
}

INLINE int dot4(const int a, const int b, const int c) {
    return __dp4a(a, b, c);
}

/* What is read once: it is not to push out of the nearest cache what is read again. */
INLINE uint4 stream16(const uchar* p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(__cvta_generic_to_global(p)));
    return v;
}

/* x of the thread whose number differs in the bits of `mask` (below 32); every thread of the group takes part. */
INLINE float lane_xor(const float x, const int mask, float*) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

/* The sum over 32 neighbours, in LANE_PARTS parts: one here. */
#define LANE_PARTS 1
INLINE float lanes_sum(float x) {
    UNROLL for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

INLINE uint rotate(const uint x, const uint n) {
    return __funnelshift_l(x, x, n);
}

INLINE uint byte_pick(const uint lo, const uint hi, const uint pick) {
    return __byte_perm(lo, hi, pick & 0x7777u);
}
