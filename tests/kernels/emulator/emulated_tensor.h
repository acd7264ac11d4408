/* src/tensor.h for a device without tensor cores: lanes meet in local memory. For tests of the kernels that use it. */
#define WARP_WORDS 6 /* of a lane */
#define WARP_ROOM(warps) LOCAL uint warp_room[(warps) * 32 * WARP_WORDS];
#define WARP_ARGS , SHARED uint* warp_room
#define WARP_PASS , warp_room
#define DEVICE_FENCE() mem_fence(CLK_GLOBAL_MEM_FENCE)
#define N_GROUPS(d) ((int)get_num_groups(d))
#define exp2_fast(x) exp2(x)
#define reciprocal(x) (1.0f / (x))
#define copies_commit()
#define copies_wait(newer)
#define mma(c, a, b) emulated_mma(c, a, b, warp_room)
#define load_tiles(r, row) emulated_load(r, row, 0, warp_room)
#define load_tiles_transposed(r, row) emulated_load(r, row, 1, warp_room)
#define lane_xor(x, mask) emulated_xor(x, mask, warp_room)

/* Word i of another lane of this warp. */
#define WORD_OF(lane, i) room[((LOCAL_ID(0) & ~31) + (lane)) * WARP_WORDS + (i)]

INLINE void copy16(SHARED ushort* to, GLOBAL const uchar* from) {
    *(SHARED uint4*)to = *(GLOBAL const uint4*)from;
}

INLINE void copies_done(void) {
}

INLINE float half_of(const uint pair, const int which) {
    return half_bits((pair >> (16 * which)) & 0xffffu);
}

INLINE uint bits_of(const float x) {
    ushort h;
    vstore_half_rte(x, 0, (half*)&h);
    return h;
}

INLINE uint half2_of(const float lo, const float hi) {
    return bits_of(lo) | bits_of(hi) << 16;
}

INLINE uint half2_fma(const uint a, const uint b, const uint c) {
    return half2_of(half_of(a, 0) * half_of(b, 0) + half_of(c, 0), half_of(a, 1) * half_of(b, 1) + half_of(c, 1));
}

INLINE uint half2_add(const uint a, const uint b) {
    return half2_of(half_of(a, 0) + half_of(b, 0), half_of(a, 1) + half_of(b, 1));
}

INLINE void emulated_mma(float* c, const uint* a, const uint* b, SHARED uint* room) {
    const int lane = LOCAL_ID(0) & 31, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) WORD_OF(lane, i) = a[i];
    for (int i = 0; i < 2; ++i) WORD_OF(lane, 4 + i) = b[i];
    BARRIER();
    for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        float sum = c[i];
        for (int k = 0; k < 16; ++k) {
            const uint left = WORD_OF(4 * (row % 8) + k % 8 / 2, row / 8 + 2 * (k / 8));
            const uint right = WORD_OF(4 * column + k % 8 / 2, 4 + k / 8);
            sum += half_of(left, k % 2) * half_of(right, k % 2);
        }
        c[i] = sum;
    }
    BARRIER();
}

INLINE void emulated_load(uint* r, SHARED const ushort* row, const int transposed, SHARED uint* room) {
    const int lane = LOCAL_ID(0) & 31, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) WORD_OF(lane, i) = (uint)row[2 * i] | (uint)row[2 * i + 1] << 16;
    BARRIER();
    for (int m = 0; m < 4; ++m) {
        const uint first = WORD_OF(8 * m + 2 * t, g / 2) >> (16 * (g % 2));
        const uint second = WORD_OF(8 * m + 2 * t + 1, g / 2) >> (16 * (g % 2));
        r[m] = transposed ? (first & 0xffffu) | second << 16 : WORD_OF(8 * m + g, t);
    }
    BARRIER();
}

INLINE float emulated_xor(const float x, const int mask, SHARED uint* room) {
    const int lane = LOCAL_ID(0) & 31;
    WORD_OF(lane, 0) = FLOAT_BITS(x);
    BARRIER();
    const float y = BITS_FLOAT(WORD_OF(lane ^ mask, 0));
    BARRIER();
    return y;
}

INLINE void copy16_or_zeros(SHARED ushort* to, GLOBAL const uchar* from, const int there) {
    *(SHARED uint4*)to = there ? *(GLOBAL const uint4*)from : (uint4)(0);
}

INLINE void load4_fresh(float* v, GLOBAL const float* p) {
    for (int i = 0; i < 4; ++i) v[i] = ((GLOBAL volatile const float*)p)[i];
}

INLINE void load2_fresh(float* v, GLOBAL const float* p) {
    for (int i = 0; i < 2; ++i) v[i] = ((GLOBAL volatile const float*)p)[i];
}
