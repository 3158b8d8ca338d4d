// The one C++ spelling of the update, for host and device. Knows no threads, no layout, no storage type.
// Twins: kernels/reference.py (eager torch). All spellings do the same IEEE float32 operations in the same
// order, so results agree bit for bit: compile with -ffp-contract=off (nvcc: -fmad=false).
#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__CUDACC__)
#define SAFEFREEZE_INLINE __host__ __device__ __forceinline__
#else
#define SAFEFREEZE_INLINE inline __attribute__((always_inline))
#endif

namespace safefreeze {

// Finished once per step and per set on the host, in double, then rounded to float32 once.
struct Scalars {
  float grad_multiplier;  // clip coefficient / loss scale, negative to maximize
  float weight_decay;     // L2 form (Adam); unused by the decoupled form
  float decay;            // 1 - lr * weight_decay in the decoupled form (AdamW), else 1
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float step_size;   // lr / (1 - beta1^t)
  float bias2_sqrt;  // sqrt(1 - beta2^t)
  float eps;
  uint32_t step;  // how many steps elements of the set have taken, this one included; the noise of stochastic rounding
};

SAFEFREEZE_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

#if defined(__AVX512F__)
// Sixteen elements in a register, for what is written once for one or sixteen.
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Integers __attribute__((vector_size(64)));

SAFEFREEZE_INLINE Floats square_root(Floats x) { return (Floats)_mm512_maskz_sqrt_ps(0xffff, (__m512)x); }
#endif

// a * b + c, rounded once.
SAFEFREEZE_INLINE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#if defined(__AVX512F__)
SAFEFREEZE_INLINE Floats multiply_add(Floats a, float b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)c);
}
SAFEFREEZE_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#endif

// What of an element depends on how many steps it has taken, for one or for several. The reciprocal is the bias's,
// rounded to nearest.
template <typename Float>
struct AgedScalars : Scalars {
  Float step_size, bias2_sqrt, reciprocal;
};

SAFEFREEZE_INLINE float reciprocal_of(const Scalars& s) { return 1.0f / s.bias2_sqrt; }
template <typename Float>
SAFEFREEZE_INLINE Float reciprocal_of(const AgedScalars<Float>& s) {
  return s.reciprocal;
}

// root / bias2_sqrt + eps of a root that is not negative. Where the machine multiplies and adds in one operation no
// element waits for this division: what the product with the rounded reciprocal leaves over, multiplied by it again,
// corrects the product to the nearest float (Markstein 1990). It does for every divisor: of each, all roots whose
// quotient is near enough to a tie to go wrong are tried by the tests (all_divisors.cpp).
template <typename Float, typename Own>
SAFEFREEZE_INLINE Float denominator(Float root, const Own& s) {
#if defined(__FMA__)
  const auto reciprocal = reciprocal_of(s);
  const Float product = root * reciprocal, rest = multiply_add(product, -s.bias2_sqrt, root);
  const Float sum = multiply_add(rest, reciprocal, product) + s.eps;
  return rest == rest ? sum : root;  // infinity and NaN leave no number over
#else
  return root / s.bias2_sqrt + s.eps;
#endif
}

// Adam(W) of one element, or of several whose scalars may differ. `l2` adds weight_decay * p to the gradient; `amsgrad`
// divides by the running maximum, which keeps NaN as torch.maximum does.
template <bool l2, bool amsgrad, typename Float, typename Own>
SAFEFREEZE_INLINE void adamw(Float& p, Float g, Float& m, Float& v, Float& v_max, const Own& s) {
  g = g * s.grad_multiplier;
  if (l2) g = g + s.weight_decay * p;
  m = s.beta1 * m + s.one_minus_beta1 * g;
  v = s.beta2 * v + s.one_minus_beta2 * (g * g);
  Float second_moment = v;
  if (amsgrad) {
    v_max = ((v > v_max) | (v != v)) ? v : v_max;
    second_moment = v_max;
  }
  p = s.decay * p - s.step_size * m / denominator(square_root(second_moment), s);
}

// Storage types. Integer arithmetic only, so flush-to-zero modes change nothing; round to nearest, ties to even.
union FloatBits {
  float value;
  uint32_t bits;
};

SAFEFREEZE_INLINE float from_bf16(uint16_t stored) {
  FloatBits x;
  x.bits = static_cast<uint32_t>(stored) << 16;
  return x.value;
}

// Of the bits of one float32 or of several, those of the nearest bfloat16.
template <typename Word>
SAFEFREEZE_INLINE Word bf16_of(Word bits) {
  const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? Word{} + 0x7fc0u : rounded;
}

SAFEFREEZE_INLINE uint16_t to_bf16(float value) {
  FloatBits x;
  x.value = value;
  return static_cast<uint16_t>(bf16_of(x.bits));
}

SAFEFREEZE_INLINE float from_f16(uint16_t stored) {
  const uint32_t sign = static_cast<uint32_t>(stored & 0x8000u) << 16;
  const uint32_t magnitude = stored & 0x7fffu;
  FloatBits normal, subnormal;
  // Rebias the exponent by 112; infinities and NaNs take another 112 to reach exponent 255.
  normal.bits = (magnitude << 13) + (magnitude >= 0x7c00u ? 224u << 23 : 112u << 23);
  // A subnormal is magnitude * 2^-24: an integer below 1024, exactly a normal float32.
  subnormal.value = static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f;
  normal.bits = (magnitude < 0x0400u ? subnormal.bits : normal.bits) | sign;
  return normal.value;
}

SAFEFREEZE_INLINE uint16_t to_f16(float value) {
  FloatBits x;
  x.value = value;
  const uint32_t sign = (x.bits >> 16) & 0x8000u;
  const uint32_t magnitude = x.bits & 0x7fffffffu;
  // Normal results: drop 13 bits with round-to-nearest-even; a carry moves into the exponent, up to infinity.
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: shift the full significand right until its unit is 2^-24, rounding alike.
  const uint32_t exponent = magnitude >> 23;
  const uint32_t shift = exponent < 102u ? 31u : (exponent > 125u ? 1u : 126u - exponent);
  const uint32_t significand = exponent < 102u ? 0u : ((magnitude & 0x007fffffu) | 0x00800000u);
  const uint32_t subnormal = (significand + ((1u << (shift - 1u)) - 1u) + ((significand >> shift) & 1u)) >> shift;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // 65520 and more round to infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return static_cast<uint16_t>(result | sign);
}

// A float32 master as bfloat16 and 16 more bits. The bfloat16 is the master rounded to nearest, ties away from zero (of
// ties to even one could not tell which way they went); a NaN loses its payload. A weight that was written from outside
// meets a remainder that is not its own: their master still rounds to the weight. Only where the bits would be a NaN's
// (zero has no neighbour below, infinity none above) the master is the weight itself.
template <typename Word>
SAFEFREEZE_INLINE Word master_of(Word stored, Word remainder) {
  const Word bits = ((stored - (remainder >> 15)) << 16) | remainder;
  return (bits & 0x7fffffffu) > 0x7f800000u ? stored << 16 : bits;
}

template <typename Word>
SAFEFREEZE_INLINE Word split_master(Word bits, Word& remainder) {
  bits = (bits & 0x7fffffffu) > 0x7f800000u ? Word{} + 0x7fc00000u : bits;
  remainder = bits & 0xffffu;
  return (bits + 0x8000u) >> 16;
}

SAFEFREEZE_INLINE float from_remainder(uint16_t stored, uint16_t remainder) {
  FloatBits x;
  x.bits = master_of<uint32_t>(stored, remainder);
  return x.value;
}

SAFEFREEZE_INLINE uint16_t to_remainder(float value, uint16_t& remainder) {
  FloatBits x;
  x.value = value;
  uint32_t lower;
  const uint32_t upper = split_master(x.bits, lower);
  remainder = static_cast<uint16_t>(lower);
  return static_cast<uint16_t>(upper);
}

// Stochastic rounding: up with the probability that makes the expected result exact, to 16 bits. `noise` is uniform.
template <typename Word>
SAFEFREEZE_INLINE Word bf16_of(Word bits, Word noise) {
  return (bits & 0x7fffffffu) > 0x7f800000u ? Word{} + 0x7fc0u : (bits + noise) >> 16;
}

SAFEFREEZE_INLINE uint16_t to_bf16(float value, uint16_t noise) {
  FloatBits x;
  x.value = value;
  return static_cast<uint16_t>(bf16_of<uint32_t>(x.bits, noise));
}

SAFEFREEZE_INLINE uint16_t to_f16(float value, uint16_t noise) {
  FloatBits x;
  x.value = value;
  const uint32_t sign = (x.bits >> 16) & 0x8000u;
  const uint32_t magnitude = x.bits & 0x7fffffffu;
  // As in to_f16(value), with noise below the last bit that is kept instead of half of it.
  const uint32_t normal = (magnitude - (112u << 23) + (noise >> 3)) >> 13;
  const uint32_t exponent = magnitude >> 23;
  const uint32_t shift = exponent < 102u ? 31u : (exponent > 125u ? 1u : 126u - exponent);
  const uint32_t significand = exponent < 102u ? 0u : ((magnitude & 0x007fffffu) | 0x00800000u);
  const uint32_t below = shift > 16u ? static_cast<uint32_t>(noise) << (shift - 16u) : noise >> (16u - shift);
  const uint32_t subnormal = (significand + below) >> shift;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = result > 0x7c00u ? 0x7c00u : result;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;  // 65536 and more are infinity
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return static_cast<uint16_t>(result | sign);
}

// Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011): ten rounds on a counter, keyed.
struct Words {
  uint32_t word[4];
};

SAFEFREEZE_INLINE Words philox(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(counter.word[0]) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(counter.word[2]) * 0xCD9E8D57u;
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The noise of eight neighbours, elements 8 * group to 8 * group + 7 of tensor `number`: element e has 16 bits of it,
// those at 16 * (e % 2) of word (e % 8) / 2. It depends on nothing else, so not on how the work was cut.
SAFEFREEZE_INLINE Words noise_of_eight(uint64_t seed, uint32_t step, uint32_t number, uint64_t group) {
  return philox({{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), step, number}},
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

SAFEFREEZE_INLINE uint16_t noise_of(const Words& eight, uint64_t element) {
  return static_cast<uint16_t>(eight.word[(element >> 1) & 3u] >> (16u * (element & 1u)));
}

// Moments in 8 bits each, as codes that stand for themselves: no scale is shared, so no neighbour spoils an element,
// and what moves keeps its values. The two bytes of an element are one word, from its highest bit on:
//   9 bits  v: a float without sign of 7 exponent and 2 mantissa bits, from 1.25 * 2^-95 to 1.25 * 2^32. 0 is 0 alone;
//           the two largest are infinity and NaN. Its upper 8 bits are the byte of v, the last is the top of m's.
//   1 bit   the sign of m
//   6 bits  |m| in units of a power of two within a factor of the root of 2 of v's own root: a float of 3 exponent and
//           3 mantissa bits, evenly spaced by 1/64 below 1/4, to 13; the two largest are infinity and NaN.
// Integer arithmetic, and sums of floats that are exact or far above the subnormal, so modes of rounding those change
// nothing. Rounding is up or down by 32 bits of noise, of which v takes the upper 21 and m the lower 20; a v that is
// not 0 never becomes 0.
constexpr uint32_t to_nearest = 0x80080000u;  // the noise that rounds both to nearest, ties up

SAFEFREEZE_INLINE float float_of(uint32_t bits) {
  FloatBits x;
  x.bits = bits;
  return x.value;
}
SAFEFREEZE_INLINE uint32_t bits_in(float value) {
  FloatBits x;
  x.value = value;
  return x.bits;
}
#if defined(__AVX512F__)
SAFEFREEZE_INLINE Floats float_of(Integers bits) { return (Floats)bits; }
SAFEFREEZE_INLINE Integers bits_in(Floats value) { return (Integers)value; }
#endif

template <typename Word, typename Float>
SAFEFREEZE_INLINE void decode_moments(Word first, Word second, Float& m, Float& v) {
  const Word code = second << 1 | first >> 7, size = first & 63u;
  Word bits = code == 0u ? Word{} : (code + 128u) << 21;
  v = float_of(code > 509u ? 0x7f800000u + ((code - 510u) << 22) : bits);
  const Word exponent = (code >> 3) + 76u;  // of half of the smallest |m| that is not among the evenly spaced
  const Word even = size < 8u ? Word{} + 8u : Word{};
  bits = ((size + even) << 20) + (exponent << 23);
  bits = bits_in(float_of(bits) - float_of(even == 0u ? Word{} : (exponent + 1u) << 23));
  bits = size > 61u ? 0x7f800000u + ((size - 62u) << 22) : bits;
  m = float_of(bits | (first & 64u) << 25);
}

template <typename Word, typename Float>
SAFEFREEZE_INLINE void encode_moments(Float m, Float v, Word noise, Word& first, Word& second) {
  const Word v_bits = bits_in(v), m_bits = bits_in(m), m_size = m_bits & 0x7fffffffu;
  Word code = (v_bits + (noise >> 11)) >> 21;
  code = (code < 129u ? Word{} + 129u : code) - 128u;
  code = code > 509u ? Word{} + 509u : code;
  code = v_bits == 0u ? Word{} : code;
  code = v_bits > 0x7f7fffffu ? (v_bits > 0x7f800000u ? Word{} + 511u : Word{} + 510u) : code;
  const Float in_units = float_of(m_size) * float_of((174u - (code >> 3)) << 23);
  // Below 1/8 floats are spaced ever closer; those of the sum with it, evenly, are more then, and fewer above.
  const Word close = bits_in(in_units), even = bits_in(in_units + 0.125f) - 0x800000u;
  Word size = (((close > even ? close : even) + (noise & 0xfffffu)) >> 20) - 984u;
  size = size > 61u ? Word{} + 61u : size;
  size = m_size > 0x7f7fffffu ? (m_size > 0x7f800000u ? Word{} + 63u : Word{} + 62u) : size;
  const Word sign = m_size > 0x7f800000u ? Word{} : m_bits >> 25 & 64u;
  first = (code & 1u) << 7 | sign | size;
  second = code >> 1;
}

// The largest v so far (amsgrad), to nearest: 7 exponent bits and 1 mantissa bit, otherwise as v. It never decays, so
// what rounding drops does not add up.
template <typename Word>
SAFEFREEZE_INLINE Word largest_bits_of(Word code) {
  const Word bits = code == 0u ? Word{} : (code + 64u) << 22;
  return code > 253u ? 0x7f800000u + ((code - 254u) << 22) : bits;
}

template <typename Word>
SAFEFREEZE_INLINE Word largest_code_of(Word bits) {
  Word code = (bits + 0x200000u) >> 22;
  code = code < 65u ? Word{} + 1u : code - 64u;
  code = code > 253u ? Word{} + 253u : code;
  code = bits == 0u ? Word{} : code;
  return bits > 0x7f7fffffu ? (bits > 0x7f800000u ? Word{} + 255u : Word{} + 254u) : code;
}

// A bijection that spreads every bit (lowbias32, Wellons 2018), for the key of a tensor's step. The noise of moments
// depends on nothing else but the element, so not on how the work was cut.
template <typename Word>
SAFEFREEZE_INLINE Word mix(Word x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

SAFEFREEZE_INLINE uint32_t noise_seed(uint64_t seed, uint32_t number) {
  return mix(mix(mix(static_cast<uint32_t>(seed)) + static_cast<uint32_t>(seed >> 32)) + number);
}

SAFEFREEZE_INLINE uint32_t noise_key(uint32_t noise_seed, uint32_t step) { return mix(noise_seed + step); }

// From one element to the next the bits that v takes move by the golden ratio, and so do those of m: neighbours are
// spread evenly. Where they begin the key decides, anew at each step, so an element's noise is uniform, and that of
// other steps says nothing of it.
template <typename Word>
SAFEFREEZE_INLINE Word spread_noise(Word x) {
  return x * 0x9e39e377u;
}

SAFEFREEZE_INLINE uint32_t noise_begin(uint32_t key, uint64_t element) {
  return key + static_cast<uint32_t>(element) + static_cast<uint32_t>(element >> 32) * 0x9e3779b9u;
}

SAFEFREEZE_INLINE uint32_t moment_noise(uint32_t key, uint64_t element) {
  return spread_noise(noise_begin(key, element));
}

}  // namespace safefreeze
