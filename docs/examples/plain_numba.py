"""A product with one token by plain numba: loops over single numbers, nothing else."""

import numba

import tinyllm
from tinyllm.kernels.cpu.numba_door import floats
from tinyllm.kernels.cpu.simd import get_half, get_i8


@tinyllm.kernel("matvec", "Q8_0")
@numba.njit
def loops(w, x, y, n_in, tile_bytes, first, last, worker):
    """y of 16 rows for each tile. A block of a tile: 16 scales, then 4 codes of each row, 8 times."""
    values = floats(x, n_in)
    for tile in range(first, last):
        out = floats(y + 64 * tile, 16)
        for row in range(16):
            total = numba.float32(0)
            for block in range(n_in // 32):
                p = w + tile * tile_bytes + block * 16 * 34
                codes = p + 32 + 4 * row
                some = numba.float32(0)
                for c in range(32):
                    some += values[32 * block + c] * get_i8(codes + 64 * (c // 4) + c % 4)
                total += some * get_half(p + 2 * row)
            out[row] = total
