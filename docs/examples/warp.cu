/* A product with one token in CUDA C: a warp for each row, a lane for each 32nd block of it.

   On the device all codes of a matrix of Q8_0 come first, 32 bytes for each block, then all scales, two bytes each:
   `blocks` says where. The words of tinyllm's prelude (half_at here) can be used. */

// @tinyllm.kernel("matvec", "Q8_0", threads=32, rows=1)
extern "C" __global__ void warp_a_row(const unsigned char* w, unsigned long long blocks, const float* x, float* y,
                                      const float* bias, int n_rows, int n_in, int n_out) {
    const int row = blockIdx.x, t = blockIdx.y, lane = threadIdx.x, n_blocks = n_in / 32;
    if (row >= n_out || t >= n_rows) return;
    const unsigned short* scales = (const unsigned short*)(w + 32 * blocks);
    float sum = 0.0f;
    for (int b = lane; b < n_blocks; b += 32) {
        const unsigned long long block = (unsigned long long)row * n_blocks + b;
        const signed char* codes = (const signed char*)w + 32 * block;
        float some = 0.0f;
        for (int i = 0; i < 32; ++i) some += (float)codes[i] * x[(long long)t * n_in + 32 * b + i];
        sum += some * half_at(scales + block);
    }
    for (int o = 16; o > 0; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if (lane == 0) y[(long long)t * n_out + row] = sum + (bias ? bias[row] : 0.0f);
}
