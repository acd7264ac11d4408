/* A product in OpenCL C, with any number of tokens: a group of 32 for each row and token; warp.cu says how Q8_0 lies. */

// @tinyllm.kernel("matvec", "Q8_0", threads=32, rows=1)
__kernel void group_a_row(__global const uchar* w, ulong blocks, __global const float* x, __global float* y,
                          __global const float* bias, int n_rows, int n_in, int n_out) {
    __local float parts[32];
    const int row = get_group_id(0), t = get_group_id(1), lane = get_local_id(0), n_blocks = n_in / 32;
    __global const half* scales = (__global const half*)(w + 32 * blocks);
    float sum = 0.0f;
    for (int b = lane; b < n_blocks; b += 32) {
        const ulong block = (ulong)row * n_blocks + b;
        __global const char* codes = (__global const char*)w + 32 * block;
        float some = 0.0f;
        for (int i = 0; i < 32; ++i) some += (float)codes[i] * x[(long)t * n_in + 32 * b + i];
        sum += some * vload_half(block, scales);
    }
    parts[lane] = sum;
    barrier(CLK_LOCAL_MEM_FENCE);
    if (lane == 0 && row < n_out && t < n_rows) {
        sum = bias ? bias[row] : 0.0f;
        for (int i = 0; i < 32; ++i) sum += parts[i];
        y[(long)t * n_out + row] = sum;
    }
}
