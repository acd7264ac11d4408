"""Matrix products: kernels around the micro-kernels of ``micro`` (quantised) and ``floats`` (F32, F16, BF16).

One token: ``matvec``, straight from the tiles; up to ``few_rows``: ``matmul_few``, likewise, some at a time.
More: ``matmul``; a thread unpacks a few tiles into its scratch memory and runs all tokens past them, so that
unpacking costs little. The line ``ahead`` bytes behind each that comes from memory is asked for: ``timing``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from . import amx, bfloat, elementwise, floats, jit, micro, minima, pairs, planes, records, timing
from .emit import has_amx, instruction_set
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
    spread_rows,
    store_tiles,
    tile_widener,
    widener,
)
from .formats import FORMATS, Format
from .jit import GIVEN
from .program import CPUArray, Planned, Tape, wrapped
from .readers import Reader
from .simd import clear, f32, get_f32, get_i8, get_i32, load, set_f32, store
from .timing import Way
from .weights import CPUWeight

# ---- kernels; the micro-kernels that they name are given by ``jit.kernel``

multiply = multiply_tokens = unpack = unpack_minima = add_minima = GIVEN
quantise = quantise_second = quantise_third = GIVEN
multiply_8 = multiply_6 = multiply_4 = multiply_2 = GIVEN
start = stop = GIVEN  # begin and end the use of a matrix unit, where there is one
UNPACKED = (16, 8)  # tiles unpacked together; the fewer where threads would have too few pieces
SOME = 64  # rows for which a thread takes up two tiles and a block of each at once
BLOCK = 8  # records of the longest blocks
QUANTISED = (256, 512)  # columns of a piece, of some rows and of many
CLAIMED = 2048  # columns of a row that a thread takes at once: less is not worth another thread
PAST = 1 << 20  # outputs that had better not pass through the caches
AT_ONCE = (2, 4, 6, 8)  # tokens multiplied together
SMALL = 1 << 18  # bytes of a matrix for which reading is not worth timing
TRIED = 2048  # columns of the rows that are read to time it


def quantise_rows(x, out, n_rows, n, slots, span, step_bytes, width, first, last, worker):
    """x [T, n] -> records of S tokens; spare slots keep what was there. A piece is ``width`` columns."""
    pieces = (n + width - 1) // width
    for piece in range(first, last):
        row0, begin = piece // pieces * slots, piece % pieces * width
        for column in range(begin, min(begin + width, n), span):
            record = out + (row0 * n + column * slots) // 32 * step_bytes
            for slot in range(min(slots, n_rows - row0)):
                quantise(x + 4 * ((row0 + slot) * n + column), record, slot)


def split_rows(x, out, n_rows, n, slots, span, step_bytes, width, first, last, worker):
    """x [T, n] -> records of S rows as of ``quantise_rows``, each row of x being its three digits."""
    pieces = (n + width - 1) // width
    for piece in range(first, last):
        row0, begin = piece // pieces * slots, piece % pieces * width
        for slot in range(min(slots, n_rows - row0)):
            row, digit = (row0 + slot) // 3, (row0 + slot) % 3
            source = x + 4 * row * n
            for column in range(begin, min(begin + width, n), span):
                record = out + (row0 * n + column * slots) // 32 * step_bytes
                if digit == 0:
                    quantise(source + 4 * column, record, slot)
                elif digit == 1:
                    quantise_second(source + 4 * column, record, slot)
                else:
                    quantise_third(source + 4 * column, record, slot)


def matvec(w, x, y, bias, tile_bytes, n_blocks, ahead, first, last, worker):
    """y [n_out] of one token; a piece is a tile of 16 rows."""
    for tile in range(first, last):
        multiply(w + tile * tile_bytes, x, 0, n_blocks, y + 64 * tile, ahead)
        if bias != 0:
            store(y + 64 * tile, load(y + 64 * tile) + load(bias + 64 * tile))


def matmul_few(
    w, x, y, bias, tile_bytes, n_blocks, ahead, n_out, n_tokens, digits, x_bytes, scratch,
    scratch_bytes,
    first, last, worker,
):  # fmt: skip
    """y [T, n_out] of a few tokens straight from the tiles, some rows at a time; a piece is a tile."""
    sums, n_rows = scratch + worker * scratch_bytes, n_tokens * digits
    for tile in range(first, last):
        source, row, asks = w + tile * tile_bytes, 0, ahead
        while row < n_rows:
            records, slot, to = x + row // 16 * x_bytes, row % 16, sums + 64 * row
            if n_rows - row > 6:
                multiply_8(source, records, slot, n_blocks, to, asks)
                row += 8
            elif n_rows - row > 4:
                multiply_6(source, records, slot, n_blocks, to, asks)
                row += 6
            elif n_rows - row > 2:
                multiply_4(source, records, slot, n_blocks, to, asks)
                row += 4
            else:
                multiply_2(source, records, slot, n_blocks, to, asks)
                row += 2
            asks = 0  # the tile is in a cache now
        if digits > 1:
            join_digits(sums, n_tokens, digits, 1)
        store_tiles(sums, y + 64 * tile, n_tokens, 1, n_out, 16 * tile, bias, False)


def matmul(
    w, x, y, bias, tile_bytes, n_blocks, ahead, tiles, n_out, n_tokens, digits, token_block,
    x_bytes, step_bytes, n_steps, wide, at_once, least_bytes, together, scratch, scratch_bytes,
    first, last, worker,
):  # fmt: skip
    """y [T, n_out] of many tokens; a piece is ``together`` tiles and ``token_block`` tokens.

    Columns go by chunks of ``at_once`` records, so that those of 16 rows of x stay in the first-level cache
    while the tiles pass, and the sums of all rows wait in ``sums`` [rows / 16][together][16][16]. Kernels for
    some tokens ask for the next chunk while the first rows are multiplied.
    """
    panels = scratch + worker * scratch_bytes
    per_block, panel_bytes, x_step = n_steps // n_blocks, at_once * step_bytes, x_bytes // n_steps
    least, groups = panels + together * panel_bytes, (tiles + together - 1) // together
    sums = least + together * least_bytes
    past = n_out % 16 == 0 and n_tokens * n_out >= PAST
    start()
    for piece in range(first, last):
        begin = piece % groups * together
        end = min(begin + together, tiles)
        token0 = piece // groups * token_block
        token1 = min(token0 + token_block, n_tokens)
        row0, row1 = token0 * digits, token1 * digits
        clear(sums, (row1 - row0 + 15) // 16 * together * 1024)
        for step in range(0, n_steps, at_once):
            steps = min(at_once, n_steps - step)
            source = w + begin * tile_bytes + step // per_block * (tile_bytes // n_blocks)
            for i in range(end - begin):
                to = panels + i * panel_bytes
                unpack(source + i * tile_bytes, steps // per_block, to, ahead)
            following = source + steps // per_block * (tile_bytes // n_blocks)
            if step + steps >= n_steps:
                following = w + end * tile_bytes
            y_bytes = (end - begin) * 1024
            size, n_tiles = panel_bytes, end - begin
            for row in range(row0, row1, wide):
                records = x + (row // 16) * x_bytes + step * x_step
                n, to, far = min(row1 - row, wide), sums + (row - row0) // 16 * y_bytes, following
                multiply_tokens(
                    panels, size, records, n, steps, n_tiles, to, x_bytes, y_bytes, far, tile_bytes
                )
                following = 0
        if least_bytes != 0:
            for tile in range(begin, end):
                to = least + (tile - begin) * least_bytes
                unpack_minima(w + tile * tile_bytes, n_blocks, to)
            for row in range(row0, row1, 16):
                records, to = x + (row // 16) * x_bytes, sums + (row - row0) * (end - begin) * 64
                n = min(row1 - row, 16)
                add_minima(least, least_bytes, records, n_blocks, to, n, end - begin)
        if digits > 1:
            join_digits(sums, token1 - token0, digits, end - begin)
        source = sums
        for token in range(token0, token1, 16):
            corner, n = y + 4 * (token * n_out + 16 * begin), min(token1 - token, 16)
            store_tiles(source, corner, n, end - begin, n_out, 16 * begin, bias, past)
            source += (end - begin) * 1024
    stop()


def join_digits(sums, n_tokens, digits, n_tiles):
    """Sums of rows [rows / 16][tiles][16][16], ``digits`` a token, become sums of tokens, in their place."""
    for token in range(n_tokens):
        for tile in range(n_tiles):
            row = (token + 1) * digits - 1
            total = load(sums + ((row // 16 * n_tiles + tile) * 16 + row % 16) * 64)
            while row > token * digits:
                row -= 1
                total = load(sums + ((row // 16 * n_tiles + tile) * 16 + row % 16) * 64) + total
            store(sums + ((token // 16 * n_tiles + tile) * 16 + token % 16) * 64, total)


def embed(
    w, ids, y, scale: f32, tile_bytes, n_blocks, n, offset, group, minima, signed, step_bytes,
    scratch, scratch_bytes,
    first, last, worker,
):  # fmt: skip
    """Rows ids of w, decoded and scaled: value = scale * (code - offset) + minimum."""
    scratch = scratch + worker * scratch_bytes
    for t in range(first, last):
        row = get_i32(ids + 4 * t)
        unpack(w + (row // 16) * tile_bytes, n_blocks, scratch, 0)
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
    if found := w.outside.get(operation(n_tokens)):
        return found.record(tape, w, x, bias, n_workers, joins)
    forms = prepare(tape, w, x)
    y = tape.array((n_tokens, -(-w.n_out // 16) * 16 if n_tokens == 1 else w.n_out))
    y.shape = (n_tokens, w.n_out)
    key = (w.__class__, n_tokens, n_workers, act)
    if key not in w.plans:
        w.plans[key] = _plan(tape, w, n_tokens, n_workers, act)
    planned = w.plans[key]
    size = planned.numbers.get("scratch_bytes")
    scratch = None if size is None else tape.scratch(n_workers, size)
    tape.put(planned, joins, w=w, x=forms, y=y, bias=bias, scratch=scratch)
    return y


def _plan(tape: Tape, w: CPUWeight, n_tokens: int, n_workers: int, act: str) -> Planned:
    """The instruction for products of so many tokens with weights like w."""
    claimed = None
    if n_tokens == 1:
        kernel, more, pieces = matvec_kernel(w, n_workers)
    elif n_tokens * w.digits <= few_rows(w):
        few = _few_floats if w.reader else _few_kernel
        kernel, more, pieces = few(tape, w, n_tokens, n_workers, act)
    else:
        many = bfloat.matmul_kernel if isinstance(w, bfloat.RoundedWeight) else matmul_kernel
        kernel, more, pieces = many(tape, w, n_tokens, n_workers, act)
        claimed = 1
    if more.pop("scratch", None) is not None:  # every recording takes its own
        more["scratch_bytes"] = tape.scratch(n_workers, more["scratch_bytes"]).shape[1]
    blocks = {"tile_bytes": w.tile_bytes, "n_blocks": w.n_blocks}
    return Planned(kernel, pieces, claimed or chunk(pieces), {**blocks, **more})


def few_rows(w: CPUWeight) -> int:
    """How many rows are multiplied straight from the tiles: fewer than unpacking pays for.

    A matrix unit multiplies 16 as fast as one; 16 registers do not hold what a tile is taken apart to beside 8
    sums; with AVX-512 memory is asked for beside the products of what is unpacked. Else unpacking pays the
    sooner, the more it takes: least for nibbles and bytes.
    """
    if isinstance(w, bfloat.RoundedWeight):
        return 1
    if w.format is None:
        return floats.few()
    if instruction_set() != "neon":
        return AT_ONCE[-1]
    return 32 if w.format.group == 32 and w.format.bits in (4, 8) else 16


def operation(n_tokens: int) -> str:
    """What a product with so many tokens is called where kernels from outside may replace it."""
    return "matvec" if n_tokens == 1 else "matmul"


def prepare(tape: Tape, w: CPUWeight, x: CPUArray) -> CPUArray:
    """The form of x that w's kernels read, made once for all that share x."""
    found = w.outside.get(operation(x.shape[0]))
    if found is not None and not found.wants_records:
        return x
    if isinstance(w, bfloat.RoundedWeight) and x.shape[0] > 1:
        made = tape.made_of(x)
        if "bf16" not in made:
            made["bf16"] = bfloat.round_array(tape, x)
        return made["bf16"]
    if w.format is None:
        return spread_array(tape, x) if 1 < x.shape[0] <= few_rows(w) else x
    made, key = tape.made_of(x), ("records", w.format.span, w.digits)
    if key not in made:
        made[key] = quantise_array(tape, x, w)
    return made[key]


def spread_array(tape: Tape, x: CPUArray) -> CPUArray:
    """x column by column, as the kernel for a few tokens and float weights reads it."""
    made = tape.made_of(x)
    if "columns" not in made:
        planned, shape = _spreader(*x.shape)
        made["columns"] = tape.array(shape)
        tape.put(planned, x=x, out=made["columns"])
    return made["columns"]


@lru_cache(4096)
def _spreader(n_tokens: int, n: int) -> tuple[Planned, tuple[int, int, int]]:
    """The instruction that spreads so many tokens, and the shape of what it makes."""
    at_once = floats.few_at_once(n_tokens)
    slots, passes = floats.slots_of(at_once), -(-n_tokens // at_once)
    pieces = passes * -(-n // floats.SPREAD)
    kernel = jit.kernel(spread_rows, f"spread_{slots}", spread=floats.spreader(slots))
    sizes: dict[str, Any] = {"n_rows": n_tokens, "n": n, "at_once": at_once, "slots": slots}
    return Planned(kernel, pieces, chunk(pieces), sizes), (passes, n, slots)


def quantise_array(tape: Tape, x: CPUArray, w: CPUWeight, single: bool = False) -> CPUArray:
    """x as int8 records that w meets, of one token each if ``single``."""
    assert w.format
    planned, shape = _quantiser(*x.shape, w.format.span, w.digits, single)
    out = tape.array(shape, np.uint8)
    tape.put(planned, x=x, out=out)
    return out


@lru_cache(4096)
def _quantiser(
    n_tokens: int, n: int, span: int, digits: int, single: bool
) -> tuple[Planned, tuple[int, int]]:
    """The instruction that makes records of so many tokens, and the shape of all records."""
    n_rows = n_tokens * digits
    slots = digits if single or n_tokens == 1 else records.SLOTS
    tiles = -(-n_rows // slots)
    width = QUANTISED[n_rows > SOME]
    pieces, claimed = -(-n // width), max(1, CLAIMED // width // min(slots, n_rows))
    sizes: dict[str, Any] = {"n_rows": n_rows, "n": n, "slots": slots, "span": span, "width": width}
    sizes["step_bytes"] = records.record_bytes(1, span)  # 32 columns of a token
    names = ("quantise", "quantise_second", "quantise_third")[:digits]
    made = {name: records.quantiser(slots, span, i) for i, name in enumerate(names)}
    kernel = jit.kernel(
        quantise_rows if digits == 1 else split_rows, f"{names[-1]}_{slots}_{span}", **made
    )
    planned = Planned(kernel, tiles * pieces, claimed, sizes)
    return planned, (tiles * n // 32, records.record_bytes(slots, span))


def matvec_kernel(w: CPUWeight, n_workers: int) -> tuple[jit.Kernel, dict[str, Any], int]:
    """The kernel for one token, its arguments besides those of all products, and its pieces."""
    way = way_of(w, 1, n_workers)
    if w.format:
        return _matvec(w.format, w.digits, way.order), {"ahead": way.ahead}, w.n_tiles
    more = {"ahead": way.ahead, "tiles": w.n_tiles}
    return _float_matvec(w.reader), more, -(-w.n_tiles // GROUP)


@lru_cache
def _float_matvec(reader: Reader) -> jit.Kernel:
    one, group = multiplier(reader, 1), multiplier(reader, GROUP)
    return jit.kernel(matvec_float, f"matvec_{reader.name}", multiply=one, multiply_group=group)


@lru_cache
def _matvec(fmt: Format, digits: int, order: str) -> jit.Kernel:
    name = f"matvec_{exact_name(fmt.name, digits)}_{order}"
    return jit.kernel(matvec, name, multiply=row_multiplier(fmt, digits, order))


def row_multiplier(fmt: Format, digits: int, order: str) -> Callable:
    """The micro-kernel for the digits of one token."""
    return micro.multiplier(fmt, digits, digits, order=order, joined=digits > 1)


def exact_name(kind: str, digits: int) -> str:
    """What a kernel for rows of so many digits is called."""
    return kind if digits == 1 else f"exact_{kind}"


@lru_cache
def _direct(fmt: Format, order: str) -> jit.Kernel:
    """The kernel that multiplies a few tokens straight from the tiles."""
    names = {f"multiply_{n}": micro.multiplier(fmt, n, records.SLOTS, order=order) for n in AT_ONCE}
    return jit.kernel(matmul_few, f"matmul_few_{fmt.name}_{order}", **names)


def chunk(pieces: int) -> int:
    """Pieces claimed at once: a claim should take some microseconds, and there be some for each thread."""
    return max(1, min(4, pieces // 64))


def _few_kernel(
    tape: Tape, w: CPUWeight, n_tokens: int, n_workers: int, act: str = ""
) -> tuple[jit.Kernel, dict[str, Any], int]:
    """The kernel for up to ``few_rows``, some of its arguments, and its number of pieces."""
    assert w.format
    rows = n_tokens * w.digits
    at_once = next((n for n in AT_ONCE if n >= rows), AT_ONCE[-1])
    way = way_of(w, at_once, n_workers)
    rows += AT_ONCE[-1]  # the last ones may be repeated
    scratch = tape.array((n_workers, 64 * rows), "u1")
    more: dict[str, Any] = {"ahead": way.ahead, "n_out": w.n_out, "n_tokens": n_tokens}
    more["x_bytes"] = w.n_in // 32 * records.record_bytes(records.SLOTS, w.format.span)
    more["digits"] = w.digits
    more |= {"scratch": scratch, "scratch_bytes": scratch.shape[1]}
    return _direct(w.format, way.order), more, w.n_tiles


def _few_floats(
    tape: Tape, w: CPUWeight, n_tokens: int, n_workers: int, act: str
) -> tuple[jit.Kernel, dict[str, Any], int]:
    """The kernel for up to ``few_rows`` and float weights; otherwise as ``_few_kernel``."""
    at_once = floats.few_at_once(n_tokens)
    rows = -(-n_tokens // at_once) * at_once
    assert w.reader
    scratch = tape.array((n_workers, rows * PANEL_ROW), "u1")
    more: dict[str, Any] = {"tiles": w.n_tiles, "n_out": w.n_out, "n_tokens": n_tokens}
    more |= {"at_once": at_once, "slots": floats.slots_of(at_once)}
    more |= {"scratch": scratch, "scratch_bytes": scratch.shape[1]}
    more["ahead"] = way_of(w, at_once, n_workers).ahead
    return _float_few(w.reader, at_once, act), more, -(-w.n_tiles // GROUP)


@lru_cache
def _float_few(reader: Reader, at_once: int, act: str = "") -> jit.Kernel:
    end = row_storer(elementwise.ACTIVATIONS[act] if act else None)
    names = {"multiply": floats.few_multiplier(reader, at_once), "store_row": end}
    name = f"matmul_{at_once}_{reader.name}{act and '_' + act}"
    return jit.kernel(floats.matmul_float_few, name, **names)


def way_of(w: CPUWeight, n_tokens: int, n_workers: int) -> Way:
    """How the kernel for so many tokens best reads weights of this kind: what ``timing`` found.

    Matrices that caches hold anyway are read plainly.
    """
    if w.memory.nbytes < SMALL:
        return Way()
    fmt, reader, digits = w.format, w.reader, w.digits if n_tokens == 1 else 1
    n_blocks = TRIED // (w.n_in // w.n_blocks)
    tile_bytes = w.tile_bytes // w.n_blocks * n_blocks

    def record(tape: Tape, address: int, tiles: int, way: Way) -> None:
        x = wrapped(np.zeros((records.SLOTS, 4 * TRIED), np.uint8))  # floats or records
        args: dict[str, Any] = {"w": address, "x": x, "bias": None, "tile_bytes": tile_bytes}
        args |= {"n_blocks": n_blocks, "y": tape.array((n_tokens, 16 * tiles)), "ahead": way.ahead}
        if n_tokens > 1:
            scratch = tape.array((n_workers, n_tokens * PANEL_ROW), "u1")
            args |= {"n_out": 16 * tiles, "n_tokens": n_tokens}
            args |= {"scratch": scratch, "scratch_bytes": scratch.shape[1]}
        if reader is None:
            pieces = tiles
            if n_tokens == 1:
                kernel = _matvec(fmt, digits, way.order)
            else:
                kernel = _direct(fmt, way.order)
                args |= {"x_bytes": 0, "digits": 1}
        else:
            pieces, args["tiles"] = -(-tiles // GROUP), tiles
            kernel = _float_matvec(reader) if n_tokens == 1 else _float_few(reader, n_tokens)
            if n_tokens > 1:
                args |= {"at_once": n_tokens, "slots": floats.slots_of(n_tokens)}
        tape.add(kernel, pieces, chunk(pieces), **args)

    orders = _orders(w, n_tokens, n_workers)
    name = exact_name(w.kind, digits)
    return timing.chosen(f"{name}_{n_tokens}", orders, record, tile_bytes, n_workers)


def _orders(w: CPUWeight, n_tokens: int, n_workers: int) -> Sequence[str]:
    """The orders of loads that are tried; for several tokens one, as each takes long to compile."""
    if w.format is None:
        return ("parts",)
    if n_tokens > 1:
        return ("outer",) if way_of(w, 1, n_workers).order == "outer" else ("parts",)
    n_orders = 4 if w.format.span == 256 else 3  # LLVM has little to mix in a short block
    return micro.ORDERS[:n_orders]


def matmul_kernel(
    tape: Tape, w: CPUWeight, n_tokens: int, n_workers: int, act: str = ""
) -> tuple[jit.Kernel, dict[str, Any], int]:
    """The kernel for up to so many tokens, some of its arguments, and its number of pieces."""
    ahead = way_of(w, 1, n_workers).ahead
    some = reads_along(w, n_tokens)
    if asks := some and instruction_set() == "avx512vnni":
        ahead = 0  # it is asked for meanwhile
    elif ahead and not some:  # the columns of the next panel, or of the next tile
        ahead = COLUMNS * w.reader.tile_bytes if w.reader else w.tile_bytes
    more: dict[str, Any] = {"tiles": w.n_tiles, "n_out": w.n_out, "n_tokens": n_tokens}
    more["ahead"] = ahead
    if w.reader:
        rows = -(-min(n_tokens, floats.TOKEN_BLOCK) // TOKENS) * TOKENS + COLUMNS
        scratch = tape.array((n_workers, rows * PANEL_ROW), "u1")
        end = row_storer(elementwise.ACTIVATIONS[act] if act else None)
        names = {"widen_tile": tile_widener(w.reader), "store_row": end}
        kernel = jit.kernel(matmul_float, f"matmul_{w.reader.name}{act and '_' + act}", **names)
        pieces = -(-w.n_tiles // GROUP) * -(-n_tokens // floats.TOKEN_BLOCK)
    else:
        kernel, step_bytes, at_once, wide = _matmul_quantised(w.kind, asks)
        at_once = BLOCK if some else at_once
        n_steps, together = w.n_in // 32, tiles_together(w, n_tokens, n_workers)
        token_block = tokens_together(w.digits)
        sums = -(-min(n_tokens, token_block) * w.digits // 16) * 1024
        assert w.format
        least = w.n_blocks * minima.n_minima(w.format) * 64
        scratch = tape.array((n_workers, together * (at_once * step_bytes + least + sums)), "u1")
        more["x_bytes"] = n_steps * records.record_bytes(records.SLOTS, w.format.span)
        more |= {"step_bytes": step_bytes, "n_steps": n_steps, "wide": wide, "at_once": at_once}
        more |= {"least_bytes": least, "together": together, "token_block": token_block}
        more["digits"] = w.digits
        pieces = -(-w.n_tiles // together) * -(-n_tokens // token_block)
    more |= {"scratch": scratch, "scratch_bytes": scratch.shape[1]}
    return kernel, more, pieces


def tiles_together(w: CPUWeight, n_tokens: int, n_workers: int) -> int:
    """Tiles of a piece: the more, the fewer times activations are read."""
    wanted = w.n_tiles // (4 * n_workers)
    if reads_along(w, n_tokens):
        return 2
    return next((n for n in UNPACKED if n <= wanted), UNPACKED[-1])


def reads_along(w: CPUWeight, n_tokens: int) -> bool:
    """Whether a thread takes up little at a time, so that it reads beside its arithmetic: for some tokens."""
    return w.format is not None and n_tokens * w.digits <= SOME and not has_amx()


def blocking() -> tuple[int, int]:
    """Records unpacked together, some whole blocks, and rows of x whose sums wait meanwhile.

    Those that read more a time want less of both: of x in the first-level cache, of sums in the second.
    """
    return (8, 256) if pairs.serves() else (32, 512)


def tokens_together(digits: int) -> int:
    """The most tokens of a piece."""
    return blocking()[1] // digits // 16 * 16


@lru_cache
def _matmul_quantised(kind: str, asks: bool) -> tuple[jit.Kernel, int, int, int]:
    """The kernel, the bytes of 32 unpacked columns, the records and the tokens that it takes at once."""
    fmt, at_once, wide = FORMATS[kind], blocking()[0], 16
    unit: dict[str, Any] = {"start": amx.nothing, "stop": amx.nothing}
    if has_amx():
        kind, unit = f"amx_{kind}", {"start": amx.starter(fmt), "stop": amx.stop}
    if has_amx() and fmt.span == 256:
        unpack, multiply = planes.unpacker(fmt), planes.multiplier(fmt)
        size, at_once, wide = planes.panel_bytes(fmt) // 8, 8, 32
    else:
        form = micro.unpacked(fmt, whole=True)
        size_asked = fmt.tile_bytes * form.block // fmt.block if asks else 0
        unpack, multiply = micro.unpacker(fmt, form), _panels_multiplier(form, size_asked)
        kind = f"some_{kind}" if asks else kind
        size = form.tile_bytes * 32 // form.block
    names = {"unpack": unpack, "multiply_tokens": multiply, **unit}
    names |= {"unpack_minima": minima.unpacker(fmt), "add_minima": minima.tiles_adder(fmt)}
    return jit.kernel(matmul, f"matmul_{kind}", **names), size, at_once, wide


def _panels_multiplier(form: Format, asks: int) -> Callable:
    """The micro-kernel for many tokens that this processor has the instructions for."""
    if has_amx():
        return amx.multiplier(form)
    if pairs.serves():
        return micro.tokens_multiplier(form, pairs.multiplier)
    return micro.tokens_multiplier(form, asks=asks)


def record_embed(tape: Tape, w: CPUWeight, ids: CPUArray, scale: float, n_workers: int) -> CPUArray:
    """Rows of a matrix, decoded: [T, n_in]."""
    n = len(ids)
    y = tape.array((n, w.n_in))
    args: dict[str, Any] = {"w": w, "ids": ids, "y": y, "scale": scale}
    args |= {"tile_bytes": w.tile_bytes, "n": w.n_in}
    if w.format is None:
        kernel = jit.kernel(embed_float, f"embed_{w.kind}", weight=widener(w.kind))
    else:
        form = micro.unpacked(w.format)
        kernel = jit.kernel(embed, f"embed_{w.kind}", unpack=micro.unpacker(w.format, form))
        scratch = tape.array((n_workers, w.n_in // 32 * form.tile_bytes), "u1")
        args |= {"n_blocks": w.n_blocks, "step_bytes": form.tile_bytes}
        args |= {name: getattr(form, name) for name in ("offset", "group", "minima", "signed")}
        args |= {"scratch": scratch, "scratch_bytes": scratch.shape[1]}
    tape.add(kernel, n, **args)
    return y
