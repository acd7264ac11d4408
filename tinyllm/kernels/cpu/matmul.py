"""Matrix products: kernels around the micro-kernels of ``micro`` (quantised) and ``floats`` (F32, F16, BF16).

One token: ``matvec``, straight from the tiles; up to FEW: ``matmul_few``, likewise. More: ``matmul``; a thread
unpacks a few tiles into its scratch memory and runs all tokens past them, so that unpacking costs little.
"""

from __future__ import annotations

from . import amx, bfloat, elementwise, floats, jit, micro, minima, planes
from .floats import (
    COLUMNS,
    GROUP,
    PANEL_ROW,
    TOKENS,
    as_float,
    embed_float,
    matmul_float,
    matvec_float,
    multiplier,
    row_storer,
    store_tiles,
    tile_widener,
    widener,
)
from .program import CPUArray, Tape, float_bits
from .simd import (
    arg,
    clear,
    float_arg,
    get_f32,
    get_i8,
    get_i32,
    load,
    set_f32,
    store,
)
from .weights import CPUWeight

# ---- kernels; the micro-kernels that they name are given by ``jit.kernel``

multiply = multiply_tokens = unpack = quantise = unpack_minima = add_minima = None
start = stop = None  # of the matrix unit, where there is one
UNPACKED = (16, 8)  # tiles unpacked together; the fewer where threads would have too few pieces
STEPS = 32  # records unpacked together: 1024 columns, some whole blocks
QUANTISED = 512  # columns of a piece
TOKEN_BLOCK = 512
PAST = 1 << 20  # outputs that had better not pass through the caches
FEW = 8  # tokens for which unpacking does not pay


def quantise_rows(args, first, last, worker):
    """x [T, n] -> records of S tokens, of which ``used`` are filled; a piece is QUANTISED columns."""
    x, out, n_rows, n, slots = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3), arg(args, 4)
    used, span, pieces = arg(args, 5), arg(args, 6), (n + QUANTISED - 1) // QUANTISED
    for piece in range(first, last):
        tile, begin = piece // pieces, piece % pieces * QUANTISED
        for column in range(begin, min(begin + QUANTISED, n), span):
            record = out + (tile * n + column) * slots * 2
            for slot in range(used):
                row = min(tile * slots + slot, n_rows - 1)  # spare slots repeat the last row
                quantise(x + 4 * (row * n + column), record, slot)


def matvec(args, first, last, worker):
    """y [n_out] of one token; a piece is a tile of 16 rows."""
    w, x, y, bias = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    tile_bytes, n_blocks = arg(args, 4), arg(args, 5)
    for tile in range(first, last):
        multiply(w + tile * tile_bytes, x, 0, n_blocks, y + 64 * tile)
        if bias != 0:
            store(y + 64 * tile, load(y + 64 * tile) + load(bias + 64 * tile))


def matmul_few(args, first, last, worker):
    """y [T, n_out] of no more tokens than ``multiply`` takes, straight from the tiles; a piece is a tile."""
    w, x, y, bias = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    tile_bytes, n_blocks, n_out, n_tokens = arg(args, 4), arg(args, 5), arg(args, 6), arg(args, 7)
    sums = arg(args, 8) + worker * arg(args, 9)
    for tile in range(first, last):
        multiply(w + tile * tile_bytes, x, 0, n_blocks, sums)
        store_tiles(sums, y + 64 * tile, n_tokens, 1, n_out, 16 * tile, bias, False)


def matmul(args, first, last, worker):
    """y [T, n_out] of many tokens; a piece is ``together`` tiles and TOKEN_BLOCK tokens.

    Columns go by chunks of ``at_once`` records, so that those of 16 tokens stay in the first-level cache
    while the tiles pass, and the sums of all tokens wait in ``sums`` [T / 16][together][16][16].
    """
    w, x, y, bias = arg(args, 0), arg(args, 1), arg(args, 2), arg(args, 3)
    tile_bytes, n_blocks, tiles, n_out = arg(args, 4), arg(args, 5), arg(args, 6), arg(args, 7)
    n_tokens, x_bytes, step_bytes, n_steps = (
        arg(args, 8),
        arg(args, 9),
        arg(args, 10),
        arg(args, 11),
    )
    wide, at_once, least_bytes, together = (
        arg(args, 12),
        arg(args, 13),
        arg(args, 14),
        arg(args, 15),
    )
    panels = arg(args, 16) + worker * arg(args, 17)
    per_block, panel_bytes = n_steps // n_blocks, at_once * step_bytes
    least, groups = panels + together * panel_bytes, (tiles + together - 1) // together
    sums = least + together * least_bytes
    past = n_out % 16 == 0 and n_tokens * n_out >= PAST
    start()
    for piece in range(first, last):
        begin = piece % groups * together
        end = min(begin + together, tiles)
        token0 = piece // groups * TOKEN_BLOCK
        token1 = min(token0 + TOKEN_BLOCK, n_tokens)
        clear(sums, (token1 - token0 + 15) // 16 * together * 1024)
        for step in range(0, n_steps, at_once):
            steps = min(at_once, n_steps - step)
            for tile in range(begin, end):
                source = w + tile * tile_bytes + step // per_block * (tile_bytes // n_blocks)
                unpack(source, steps // per_block, panels + (tile - begin) * panel_bytes)
            y_bytes = (end - begin) * 1024
            for token in range(token0, token1, wide):
                records = x + (token // 16) * x_bytes + step * 1024
                n, to = min(token1 - token, wide), sums + (token - token0) // 16 * y_bytes
                multiply_tokens(
                    panels, panel_bytes, records, n, steps, end - begin, to, x_bytes, y_bytes
                )
        if least_bytes != 0:
            for tile in range(begin, end):
                to = least + (tile - begin) * least_bytes
                unpack_minima(w + tile * tile_bytes, n_blocks, to)
        source = sums
        for token in range(token0, token1, 16):
            corner, n = y + 4 * (token * n_out + 16 * begin), min(token1 - token, 16)
            if least_bytes != 0:
                records = x + (token // 16) * x_bytes
                add_minima(least, least_bytes, records, n_blocks, source, n, end - begin)
            store_tiles(source, corner, n, end - begin, n_out, 16 * begin, bias, past)
            source += (end - begin) * 1024
    stop()


def embed(args, first, last, worker):
    """Rows ids of w, decoded and scaled: value = scale * (code - offset) + minimum."""
    w, ids, y, scale = arg(args, 0), arg(args, 1), arg(args, 2), float_arg(args, 3)
    tile_bytes, n_blocks, n = arg(args, 4), arg(args, 5), arg(args, 6)
    offset, group, minima = arg(args, 7), arg(args, 8), arg(args, 9)
    signed, step_bytes = arg(args, 10), arg(args, 11)
    scratch = arg(args, 12) + worker * arg(args, 13)
    for t in range(first, last):
        row = get_i32(ids + 4 * t)
        unpack(w + (row // 16) * tile_bytes, n_blocks, scratch)
        lane = row % 16
        for j in range(n):
            step, i = scratch + (j // 32) * step_bytes, j % 32
            code = get_i8(step + 64 * (i // 4) + 4 * lane + i % 4)
            if signed == 0:
                code &= 255
            scales = step + 512 + 64 * (i // group) + 4 * lane
            value = get_f32(scales) * as_float(code - offset)
            if minima != 0:
                value += get_f32(scales + 64 * (32 // group))
            set_f32(y + 4 * (t * n + j), value * scale)


# ---- compiled for a kind of weight, and recorded


def record_matmul(
    tape: Tape,
    w: CPUWeight,
    x: CPUArray,
    bias: CPUArray | None,
    n_workers: int,
    joins: bool,
    act: str = "",
) -> CPUArray:
    """y = x w^T + bias: the one place that chooses a kernel by the number of tokens.

    ``act``: y is what this activation makes of it; for float weights and more than one token.
    """
    n_tokens = x.shape[0]
    forms = prepare(tape, w, x)
    y = tape.array((n_tokens, -(-w.n_out // 16) * 16 if n_tokens == 1 else w.n_out))
    y.shape = (n_tokens, w.n_out)
    bias_at = bias.address if bias is not None else 0
    common = [w.address, forms.address, y.address, bias_at, w.tile_bytes, w.n_blocks]
    if n_tokens == 1:
        _record_matvec(tape, w, common, joins)
    elif w.format is not None and n_tokens <= FEW:
        _record_few(tape, w, common, n_tokens, n_workers, joins)
    else:
        _record_many(tape, w, common, n_tokens, n_workers, joins, act)
    tape.keep(w, x, forms, y, bias)
    return y


def prepare(tape: Tape, w: CPUWeight, x: CPUArray) -> CPUArray:
    """The form of x that w's kernels read, made once for all that share x."""
    if isinstance(w, bfloat.RoundedWeight) and x.shape[0] > 1:
        if "bf16" not in x.derived:
            x.derived["bf16"] = bfloat.round_array(tape, x)
        return x.derived["bf16"]
    if w.format is None:
        return x
    key = ("records", w.format.span)
    if key not in x.derived:
        x.derived[key] = quantise_array(tape, x, w.format.span)
    return x.derived[key]


def quantise_array(tape: Tape, x: CPUArray, span: int, single: bool = False) -> CPUArray:
    """x as int8 records, of one token each if ``single``."""
    n_rows, n = x.shape
    slots = 1 if single or n_rows == 1 else micro.SLOTS
    tiles = -(-n_rows // slots)
    out = tape.array((tiles * n // 32, micro.record_bytes(slots)), "u1")
    used = min(slots, FEW) if n_rows <= FEW else slots
    name, quantise = f"quantise_{slots}_{span}", micro.quantiser(slots, span)
    pieces = -(-n // QUANTISED)
    args = [x.address, out.address, n_rows, n, slots, used, span]
    address = jit.kernel(quantise_rows, name, quantise=quantise)
    tape.add(address, tiles * pieces, args, pieces if slots == 1 else 1)
    tape.keep(x)
    return out


def _record_matvec(tape: Tape, w: CPUWeight, common: list[int], joins: bool) -> None:
    address, more = matvec_kernel(w)
    pieces = w.n_tiles if w.format else -(-w.n_tiles // GROUP)
    tape.add(address, pieces, [*common, *more], chunk(pieces), joins)


def matvec_kernel(w: CPUWeight) -> tuple[int, list[int]]:
    """The kernel for one token, and its arguments after the first six."""
    if w.format is not None:
        one = micro.multiplier(w.format, 1, 1)
        return jit.kernel(matvec, f"matvec_{w.kind}", multiply=one), []
    one, group = multiplier(w.kind, 1), multiplier(w.kind, GROUP)
    name = f"matvec_{w.kind}"
    return jit.kernel(matvec_float, name, multiply=one, multiply_group=group), [w.n_tiles]


def chunk(pieces: int) -> int:
    """Pieces claimed at once: a claim should take some ten microseconds."""
    return max(1, min(8, pieces // 16))


def _record_few(
    tape: Tape, w: CPUWeight, common: list[int], n_tokens: int, n_workers: int, joins: bool
) -> None:
    slots = next(n for n in (2, 4, 8) if n >= n_tokens)  # spare ones repeat the last token
    names = {"multiply": micro.multiplier(w.format, slots, micro.SLOTS)}
    address = jit.kernel(matmul_few, f"matmul_{slots}_{w.kind}", **names)
    scratch = tape.array((n_workers, slots * 64), "u1")
    args = [*common, w.n_out, n_tokens, scratch.address, scratch.shape[1]]
    tape.add(address, w.n_tiles, args, chunk(w.n_tiles), joins)
    tape.keep(scratch)


def _record_many(
    tape: Tape,
    w: CPUWeight,
    common: list[int],
    n_tokens: int,
    n_workers: int,
    joins: bool,
    act: str,
) -> None:
    kernel = bfloat.matmul_kernel if isinstance(w, bfloat.RoundedWeight) else matmul_kernel
    address, more, pieces, scratch = kernel(tape, w, n_tokens, n_workers, act)
    tape.add(address, pieces, [*common, *more], 1, joins)
    tape.keep(scratch)


def matmul_kernel(
    tape: Tape, w: CPUWeight, n_tokens: int, n_workers: int, act: str = ""
) -> tuple[int, list[int], int, CPUArray]:
    """The kernel for up to so many tokens, its arguments after the first six, its pieces, its scratch."""
    more = [w.n_tiles, w.n_out, n_tokens]
    if w.format is None:
        rows = -(-min(n_tokens, floats.TOKEN_BLOCK) // TOKENS) * TOKENS + COLUMNS
        scratch = tape.array((n_workers, rows * PANEL_ROW), "u1")
        end = row_storer(elementwise.ACTIVATIONS[act] if act else None)
        names = {"widen_tile": tile_widener(w.kind), "store_row": end}
        address = jit.kernel(matmul_float, f"matmul_{w.kind}{act and '_' + act}", **names)
        pieces = -(-w.n_tiles // GROUP) * -(-n_tokens // floats.TOKEN_BLOCK)
    else:
        address, step_bytes, at_once, wide = _matmul_quantised(w)
        n_steps, together = w.n_in // 32, tiles_together(w, n_workers)
        sums = -(-min(n_tokens, TOKEN_BLOCK) // 16) * 1024
        least = w.n_blocks * minima.n_minima(w.format) * 64
        scratch = tape.array((n_workers, together * (at_once * step_bytes + least + sums)), "u1")
        more += [n_steps * micro.record_bytes(micro.SLOTS), step_bytes, n_steps]
        more += [wide, at_once, least, together]
        pieces = -(-w.n_tiles // together) * -(-n_tokens // TOKEN_BLOCK)
    return address, [*more, scratch.address, scratch.shape[1]], pieces, scratch


def tiles_together(w: CPUWeight, n_workers: int) -> int:
    """Tiles of a piece: the more, the fewer times activations are read."""
    wanted = w.n_tiles // (4 * n_workers)
    return next((n for n in UNPACKED if n <= wanted), UNPACKED[-1])


def _matmul_quantised(w: CPUWeight) -> tuple[int, int, int, int]:
    """The kernel, the bytes of 32 unpacked columns, the records and the tokens that it takes at once."""
    fmt, kind, at_once, wide = w.format, w.kind, STEPS, 16
    unit = {"start": amx.nothing, "stop": amx.nothing}
    if amx.available():
        kind, unit = f"amx_{kind}", {"start": amx.starter(fmt), "stop": amx.stop}
    if amx.available() and fmt.span == 256:
        unpack, multiply = planes.unpacker(fmt), planes.multiplier(fmt)
        size, at_once, wide = planes.panel_bytes(fmt) // 8, 8, 32
    else:
        form = micro.unpacked(fmt, whole=True)
        many = amx.multiplier if amx.available() else micro.tokens_multiplier
        unpack, multiply = micro.unpacker(fmt, form), many(form)
        size = form.tile_bytes * 32 // form.block
    names = {"unpack": unpack, "multiply_tokens": multiply, **unit}
    names |= {"unpack_minima": minima.unpacker(fmt), "add_minima": minima.tiles_adder(fmt)}
    return jit.kernel(matmul, f"matmul_{kind}", **names), size, at_once, wide


def record_embed(tape: Tape, w: CPUWeight, ids: CPUArray, scale: float, n_workers: int) -> CPUArray:
    """Rows of a matrix, decoded: [T, n_in]."""
    n = len(ids)
    y = tape.array((n, w.n_in))
    args = [w.address, ids.address, y.address, float_bits(scale), w.tile_bytes]
    if w.format is None:
        address = jit.kernel(embed_float, f"embed_{w.kind}", weight=widener(w.kind))
        tape.add(address, n, [*args, w.n_in])
    else:
        form = micro.unpacked(w.format)
        scratch = tape.array((n_workers, w.n_in // 32 * form.tile_bytes), "u1")
        args += [w.n_blocks, w.n_in, form.offset, form.group, form.minima, form.signed]
        args += [form.tile_bytes, scratch.address, scratch.shape[1]]
        unpack = micro.unpacker(w.format, form)
        tape.add(jit.kernel(embed, f"embed_{w.kind}", unpack=unpack), n, args)
        tape.keep(scratch)
    tape.keep(w, ids, y)
    return y
