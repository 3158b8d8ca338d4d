"""Where Triton's kernels read and write: rows of the tables, and the places of a block of a tile.

WIDE blocks have two indices, groups of eight neighbours: so the compiler sees how many lie together, and keeps the
layouts of the two walks apart.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False, disable-error-code=import-untyped
# ruff: noqa: N803, SIM300  # compile-time names are in capitals, as Triton's documentation has them

import triton
import triton.language as tl

from .tiles import TILE, TILE_PART

# Words of the tables' rows. Addresses and offsets have 64 bits; what counts elements of one tile has 32.
_TILE_WORDS = tl.constexpr(TILE.itemsize // 8)
_PART_WORDS = tl.constexpr(TILE_PART.itemsize // 8)


@triton.jit
def tile_row(tiles):
    """This program's row of the tile table."""
    row = tiles + tl.program_id(0).to(tl.int64) * _TILE_WORDS
    small = row.to(tl.pointer_type(tl.int32)) + 4
    return tl.load(row), tl.load(row + 1), tl.load(small), tl.load(small + 1), tl.load(small + 2), tl.load(small + 3)


@triton.jit
def tile_age(tiles):
    """How far behind its part's first row of scalars that of this program's tile is."""
    row = tiles + tl.program_id(0).to(tl.int64) * _TILE_WORDS
    return tl.load(row.to(tl.pointer_type(tl.int32)) + 8)


@triton.jit
def part_row(parts, part, at, start, packed, LISTS: tl.constexpr, BITS: tl.constexpr, AGES: tl.constexpr):
    """Addresses of the tile's lists, of its first bit and of its first age, 0 where there are none; whether parts
    interleave; and whether the twin has places for what is visited alone, as bits say."""
    row = parts + part.to(tl.int64) * _PART_WORDS
    none = at.to(tl.int64) * 0
    cols, packed_cols, bits, shared, gapless, ages = none, none, none, none, none, none
    if LISTS >= 1:
        cols = tl.load(row)
        cols = tl.where(cols != 0, cols + at.to(tl.int64) * 4, 0)
    if LISTS >= 2:
        packed_cols = tl.load(row + 1)
        packed_cols = tl.where(packed_cols != 0, packed_cols + at.to(tl.int64) * 4, 0)
    if BITS:
        bits, shared = tl.load(row + 2), tl.load(row + 3)
        gapless = tl.where(bits != 0, tl.load(row + 4), 0)
        bits = tl.where(bits != 0, bits + (start >> 3), 0)
    if AGES:
        ages = tl.load(row + 5)
        ages = tl.where(ages != 0, ages + packed * 2, 0)
    return cols, packed_cols, bits, shared, gapless, ages


@triton.jit
def share_of(wide, count, WIDE: tl.constexpr):
    """How many elements of the tile a walk takes: all or none."""
    return tl.where(wide, count, 0) if WIDE else tl.where(wide, 0, count)


@triton.jit
def places(first, count, cols, packed_cols, LISTS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a tile: places in the tensor and in its twin, both counted from the tile's first, and which exist."""
    if WIDE:
        here = first + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        there = here
        inside = here < (count >> 3 << 3)  # the same number, known to be a multiple of 8
    else:
        here = first + tl.arange(0, BLOCK)
        there = here
        inside = here < count
        if LISTS >= 2:
            listed = packed_cols.to(tl.pointer_type(tl.int32)) + here
            there = tl.load(listed, mask=here < tl.where(packed_cols != 0, count, 0), other=here)
        if LISTS >= 1:
            listed = cols.to(tl.pointer_type(tl.int32)) + here
            here = tl.load(listed, mask=here < tl.where(cols != 0, count, 0), other=here)
    return here, there, inside


@triton.jit
def flags_of(bits, start, here, first, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Whether the bit of each element of a block is set; False where there are no bits."""
    count = tl.where(bits != 0, count, 0)
    if WIDE:  # the tile begins with a byte
        byte = (first >> 3) + tl.arange(0, BLOCK // 8)[:, None]
        bit = tl.arange(0, 8)[None, :]
        inside = byte < (count >> 3)
    else:
        place = (start & 7).to(tl.int32) + here
        byte = place >> 3
        bit = place & 7
        inside = first + tl.arange(0, BLOCK) < count
    word = tl.load(bits.to(tl.pointer_type(tl.uint8)) + byte, mask=inside, other=0)
    return ((word.to(tl.int32) >> bit) & 1) != 0


@triton.jit
def chosen_of(inside, bits, start, here, first, count, FROZEN: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of a block the list visits."""
    flags = flags_of(bits, start, here, first, count, WIDE, BLOCK)
    return tl.where(bits == 0, inside, inside & (flags == FROZEN))


@triton.jit
def held_places(there, gapless, chosen, taken):
    """Places in the twin of a block, and how many elements of the tile were visited up to its end: of a gapless part
    the twin has places for these alone."""
    visited = chosen.to(tl.int32)
    return tl.where(gapless != 0, taken + tl.cumsum(visited, 0) - 1, there), taken + tl.sum(visited, 0)


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """A pointer to words of the dtype's width: float32, codes of 8 bits, or the bits of a 16-bit type."""
    if DTYPE == tl.float32:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == tl.uint8:
        pointer = address.to(tl.pointer_type(tl.uint8))
    else:
        pointer = address.to(tl.pointer_type(tl.uint16))
    return tl.multiple_of(pointer, 16) if WIDE else pointer


@triton.jit
def size_of(DTYPE: tl.constexpr):
    return DTYPE.primitive_bitwidth // 8
