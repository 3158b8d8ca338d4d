"""How Triton's kernels read and store numbers: storage types, remainders, the noise of stochastic rounding.

Twins of what csrc/arithmetic.h has on these: the same integer operations in the same order.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False
# mypy: disallow-untyped-decorators=False, disable-error-code=import-untyped
# ruff: noqa: N803, SIM108, SIM300  # compile-time names are in capitals, as Triton's documentation has them

import triton
import triton.language as tl


@triton.jit
def to_float(stored, DTYPE: tl.constexpr):
    """Twin of ``from_bf16`` and ``from_f16``. ``stored``: float32, or the bits of a 16-bit type."""
    if DTYPE == tl.float32:
        value = stored
    elif DTYPE == tl.bfloat16:
        value = (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        word = stored.to(tl.int32)
        magnitude = word & 0x7FFF
        normal = (magnitude << 13) + tl.where(magnitude >= 0x7C00, 224 << 23, 112 << 23)
        subnormal = (magnitude.to(tl.float32) * 5.9604644775390625e-8).to(tl.int32, bitcast=True)
        unsigned = tl.where(magnitude < 0x0400, subnormal, normal)
        value = (unsigned.to(tl.uint32, bitcast=True) | ((word & 0x8000).to(tl.uint32) << 16)).to(
            tl.float32, bitcast=True
        )
    return value


@triton.jit
def _quiet(value):
    """The bits of a float32; every NaN as the one NaN that is stored. Nothing added below carries it out of NaN."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)


@triton.jit
def to_storage(value, noise, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Twin of ``to_bf16`` and ``to_f16``, both forms of each. ``noise``: int32, 0 to 65535, uniform; if STOCHASTIC."""
    if DTYPE == tl.float32:
        stored = value
    elif DTYPE == tl.bfloat16:
        bits = _quiet(value)
        if STOCHASTIC:
            bits = bits + noise.to(tl.uint32)
        else:
            bits = bits + 0x7FFF + ((bits >> 16) & 1)
        stored = (bits >> 16).to(tl.uint16)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        sign = (bits >> 16) & 0x8000
        magnitude = (bits & 0x7FFFFFFF).to(tl.int32)
        exponent = magnitude >> 23
        shift = tl.where(exponent < 102, 31, tl.where(exponent > 125, 1, 126 - exponent))
        significand = tl.where(exponent < 102, 0, (magnitude & 0x007FFFFF) | 0x00800000)
        if STOCHASTIC:
            normal = (magnitude - (112 << 23) + (noise >> 3)) >> 13
            # noise << shift >> 16, with all its bits
            below = tl.umulhi(noise.to(tl.uint32) << 16, tl.full(shift.shape, 1, tl.uint32) << shift)
            subnormal = (significand + below.to(tl.int32)) >> shift
            result = tl.minimum(tl.where(magnitude < (113 << 23), subnormal, normal), 0x7C00)
            result = tl.where(magnitude >= 0x47800000, 0x7C00, result)
        else:
            normal = (magnitude - (112 << 23) + 0x0FFF + ((magnitude >> 13) & 1)) >> 13
            one = tl.full(shift.shape, 1, tl.int32)
            subnormal = (significand + ((one << (shift - 1)) - 1) + ((significand >> shift) & 1)) >> shift
            result = tl.where(magnitude < (113 << 23), subnormal, normal)
            result = tl.where(magnitude >= 0x477FF000, 0x7C00, result)
        result = tl.where(magnitude > 0x7F800000, 0x7E00, result)
        stored = (result.to(tl.uint32) | sign).to(tl.uint16)
    return stored


@triton.jit
def from_remainder(stored, remainder):
    low, word = remainder.to(tl.int32), stored.to(tl.int32)
    high = (word - (low >> 15)) & 0xFFFF
    bits = (high.to(tl.uint32) << 16) | low.to(tl.uint32)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return tl.where(is_nan, word.to(tl.uint32) << 16, bits).to(tl.float32, bitcast=True)


@triton.jit
def to_remainder(value):
    bits = _quiet(value)
    return ((bits + 0x8000) >> 16).to(tl.uint16), (bits & 0xFFFF).to(tl.uint16)


@triton.jit
def _philox(word0, word1, word2, word3, key0, key1):
    """Philox4x32-10 on uint32 words; the keys are uint64 holding 32 bits."""
    for _ in tl.static_range(10):
        product0 = word0.to(tl.uint64) * 0xD2511F53
        product1 = word2.to(tl.uint64) * 0xCD9E8D57
        word0 = (product1 >> 32).to(tl.uint32) ^ word1 ^ key0.to(tl.uint32)
        word2 = (product0 >> 32).to(tl.uint32) ^ word3 ^ key1.to(tl.uint32)
        word1 = (product1 & 0xFFFFFFFF).to(tl.uint32)
        word3 = (product0 & 0xFFFFFFFF).to(tl.uint32)
        key0 = (key0 + 0x9E3779B9) & 0xFFFFFFFF
        key1 = (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return word0, word1, word2, word3


@triton.jit
def _noise_of_eight(seed, step, number, group):
    """Four words: the noise of elements ``8 * group`` to ``8 * group + 7``. ``group``: int64, a block of them."""
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    zero = low & 0
    key = tl.load(seed).to(tl.uint64, bitcast=True)
    return _philox(
        low, (group >> 32).to(tl.uint32), zero + step, zero + number, key & 0xFFFFFFFF,
        key >> 32,
    )  # fmt: skip


@triton.jit
def noise(seed, step, number, start, here, first, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """int32: the 16 bits of noise of each element of a block."""
    if WIDE:  # whole groups of eight neighbours
        group = (start >> 3) + (first >> 3) + tl.arange(0, BLOCK // 8)
        word0, word1, word2, word3 = _noise_of_eight(seed, step, number, group)
        words = tl.join(
            tl.join(word0, word2), tl.join(word1, word3)
        )  # the last two indices, read together, count words
        noise = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK // 8, 8]).to(tl.int32)
    else:
        element = start + here
        word0, word1, word2, word3 = _noise_of_eight(seed, step, number, element >> 3)
        which = (element & 7).to(tl.int32)
        word = tl.where(which < 4, tl.where(which < 2, word0, word1), tl.where(which < 6, word2, word3))
        noise = tl.where((which & 1) == 1, word >> 16, word & 0xFFFF).to(tl.int32)
    return noise


@triton.jit
def decode_moments(first, second):
    """Float32 ``m, v`` from the two bytes of each element."""
    one, other = first.to(tl.uint32), second.to(tl.uint32)
    code = (other << 1) | (one >> 7)
    size = one & 63
    bits = tl.where(code == 0, 0, (code + 128) << 21)
    v = tl.where(code > 509, 0x7F800000 + ((code - 510) << 22), bits).to(tl.float32, bitcast=True)
    exponent = (code >> 3) + 76
    even = tl.where(size < 8, 8, 0).to(tl.uint32)
    value = (((size + even) << 20) + (exponent << 23)).to(tl.float32, bitcast=True)
    value = value - tl.where(even == 0, 0, (exponent + 1) << 23).to(tl.float32, bitcast=True)
    bits = tl.where(size > 61, 0x7F800000 + ((size - 62) << 22), value.to(tl.uint32, bitcast=True))
    return (bits | ((one & 64) << 25)).to(tl.float32, bitcast=True), v


@triton.jit
def encode_moments(m, v, noise):
    """The two bytes of each element. ``noise``: uint32, uniform."""
    v_bits, m_bits = v.to(tl.uint32, bitcast=True), m.to(tl.uint32, bitcast=True)
    m_size = m_bits & 0x7FFFFFFF
    code = (v_bits + (noise >> 11)) >> 21
    code = tl.minimum(tl.maximum(code, 129) - 128, 509)
    code = tl.where(v_bits == 0, 0, code)
    code = tl.where(v_bits > 0x7F7FFFFF, 510 + (v_bits > 0x7F800000).to(tl.uint32), code)
    in_units = m_size.to(tl.float32, bitcast=True) * ((174 - (code >> 3)) << 23).to(tl.float32, bitcast=True)
    even = (in_units + 0.125).to(tl.uint32, bitcast=True) - 0x800000
    size = ((tl.maximum(in_units.to(tl.uint32, bitcast=True), even) + (noise & 0xFFFFF)) >> 20) - 984
    size = tl.minimum(size, 61)
    size = tl.where(m_size > 0x7F7FFFFF, 62 + (m_size > 0x7F800000).to(tl.uint32), size)
    sign = tl.where(m_size > 0x7F800000, 0, (m_bits >> 25) & 64)
    return (((code & 1) << 7) | sign | size).to(tl.uint8), (code >> 1).to(tl.uint8)


@triton.jit
def decode_largest(stored):
    """Float32 from the code of the largest second moment so far."""
    code = stored.to(tl.uint32)
    bits = tl.where(code == 0, 0, (code + 64) << 22)
    return tl.where(code > 253, 0x7F800000 + ((code - 254) << 22), bits).to(tl.float32, bitcast=True)


@triton.jit
def encode_largest(value):
    bits = value.to(tl.uint32, bitcast=True)
    code = (bits + 0x200000) >> 22
    code = tl.minimum(tl.where(code < 65, 1, code - 64), 253)
    code = tl.where(bits == 0, 0, code)
    return tl.where(bits > 0x7F7FFFFF, 254 + (bits > 0x7F800000).to(tl.uint32), code).to(tl.uint8)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def moment_noise(seed, step, number, start, here):
    """uint32: the noise of moments of each element of a block."""
    element = start + here
    low, high = (element & 0xFFFFFFFF).to(tl.uint32), (element >> 32).to(tl.uint32)
    key = tl.load(seed).to(tl.uint64, bitcast=True)
    zero = low & 0
    base = _mix(_mix(_mix(zero + (key & 0xFFFFFFFF).to(tl.uint32)) + (key >> 32).to(tl.uint32)) + number)
    return (_mix(base + step) + low + high * 0x9E3779B9) * 0x9E39E377
