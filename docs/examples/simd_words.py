"""A product with one token by the words of ``simd``: a lane is a row, so 16 rows are added up side by side."""

import tinyllm
from tinyllm.kernels.cpu.emit import I16, I32, V
from tinyllm.kernels.cpu.simd import emitter, f32x16, fma, get_f32, i64, splat, store


@emitter(f32x16, i64)
def halves(e, p):
    """16 half-precision numbers, one in each lane."""
    return e.half(e.load(e.ptr(p), V(I16, 16)))


@emitter(f32x16, i64, i64)
def codes(e, p, j):
    """Code j of the 4 signed codes that each lane has at p."""
    words = e.load(e.ptr(p), V(I32, 16))
    places = e.b.sub(e.b.trunc(e.b.mul(i64(3), i64(8)), I32), e.b.trunc(e.b.mul(j, i64(8)), I32))
    left = e.b.shl(words, e.splat(places, 16))
    return e.to_float(e.b.ashr(left, e.const(24, words.type)))


@tinyllm.kernel("matvec", "Q8_0")
def lanes(w, x, y, n_in, tile_bytes, first, last, worker):
    """A piece is a tile: y of 16 rows. A block of a tile is 16 scales, then 4 codes of each row, 8 times."""
    for tile in range(first, last):
        total = splat(0.0)
        for block in range(n_in // 32):
            p = w + tile * tile_bytes + block * 16 * 34
            some = splat(0.0)
            for c in range(8):
                for j in range(4):
                    v = splat(get_f32(x + 4 * (32 * block + 4 * c + j)))
                    some = fma(codes(p + 32 + 64 * c, j), v, some)
            total = fma(some, halves(p), total)
        store(y + 64 * tile, total)
