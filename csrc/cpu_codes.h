// Steps whose moments are codes (arithmetic.h): of cpu.cpp, which includes this.
#pragma once

// What a block's codes are read from and written to, where its elements do not lie together; and its noise.
struct Codes {
  uint8_t m[block + slack], v[block + slack], x[block + slack];
  uint32_t noise[block + slack];
};

inline uint8_t* codes_of(int64_t address, const Place& place, int64_t n, uint8_t* stage) {
  uint8_t* const data = at<uint8_t>(address);
  if (place.together()) return data + place.start;
  pick(data, place, n, stage);
  return stage;
}

inline void put_codes(const void* codes, const Block& b, int64_t address) {
  if (!b.packed.together()) put(static_cast<const uint8_t*>(codes), b.n, at<uint8_t>(address), b.packed);
}

// What the noise of moments is spread from, as `make_noise` has that of parameters. Null: elements follow each other,
// and so do the numbers from `begin` on that it is spread from.
inline const uint32_t* make_moment_noise(uint64_t seed, uint32_t step, const Aged* aged, uint32_t number,
                                         const Place& place, int64_t n, uint32_t* noise, uint32_t& begin) {
  const uint32_t base = noise_seed(seed, number), key = noise_key(base, step);
  const uint64_t first = static_cast<uint64_t>(place.start), last = first + static_cast<uint64_t>(n);
  begin = noise_begin(key, first);
  if (place.together() && !aged && first >> 32 == last >> 32) return nullptr;
  each_element(place, n, [&](int64_t i, uint64_t element) {
    noise[i] = noise_begin(aged ? noise_key(base, aged->step[i]) : key, element);
  });
  return noise;
}

// What a step of codes needs beside `Elements`, whose m, v and x are bytes: `make_moment_noise`.
struct Coding {
  const uint32_t* noise;
  uint32_t begin;
};

#if defined(SAFEFREEZE_SIXTEEN)
// |m| in its units times 2^64, which what `decode_16` multiplies by lacks, by the 6 bits that say so.
struct Sizes {
  alignas(64) float of[64];
  constexpr Sizes() : of() {
    float unit = 288230376151711744.0f;  // 2^58
    for (int i = 0; i < 64; ++i) {
      if (i >= 16 && i % 8 == 0) unit = unit * 2.0f;
      of[i] = static_cast<float>(i < 16 ? i : 8 + i % 8) * unit;
    }
    of[62] = __builtin_inff();
    of[63] = __builtin_nanf("");
  }
};
constexpr Sizes sizes_of_m{};

// Constants that the compiler keeps in memory, if it has no register for them: it would otherwise put them together
// anew each time, where vectors are worked on.
struct Constants {
  Integers largest_code, bias, units, sign, noise_1, noise_2, low_bits, finite, one, exponent, back, eight, most,
      sign_bit;
  Floats eighth;

  Constants() {
    const auto set = [](Integers& to, uint32_t value) {
      to = Integers{} + value;
      asm("" : "+v"(to));
    };
    set(largest_code, 509u);
    set(bias, 128u);
    set(units, 0x7f800000u);
    set(sign, 0x80000000u);
    set(noise_1, 0x9e3779b1u);
    set(noise_2, 0x85ebca77u);
    set(low_bits, 0xfffffu);
    set(finite, 0x7f7fffffu);
    set(one, 1u);
    set(exponent, 174u);
    set(back, 984u);
    set(eight, 8u);
    set(most, 61u);
    set(sign_bit, 64u);
    eighth = Floats{} + 0.125f;
    asm("" : "+v"(eighth));
  }
};

// `decode_moments` of sixteen, with fewer instructions.
inline void decode_16(Integers first, Integers second, const Constants& c, Floats& m, Floats& v) {
  const Integers code = second << 1 | first >> 7;
  const __mmask16 special = _mm512_cmpgt_epu32_mask((__m512i)code, (__m512i)c.largest_code);
  if (__builtin_expect(special, 0)) return decode_moments(first, second, m, v);
  const __m512i at = (__m512i)first, bits = (__m512i)((code + c.bias) << 21);
  v = (Floats)_mm512_maskz_mov_epi32(_mm512_test_epi32_mask((__m512i)code, (__m512i)code), bits);
  const auto size = [](int from) { return _mm512_load_ps(sizes_of_m.of + from); };
  const __m512 few = _mm512_permutex2var_ps(size(0), at, size(16)),
               many = _mm512_permutex2var_ps(size(32), at, size(48));
  const __mmask16 is_many = _mm512_movepi32_mask((__m512i)(first << 26));
  const Floats magnitude = (Floats)_mm512_mask_blend_ps(is_many, few, many);
  const Floats scaled = magnitude * (Floats)((Integers)bits >> 1 & c.units);
  m = (Floats)((Integers)scaled | ((first << 25) & c.sign));
}

// `encode_moments` of sixteen; of the upper bits of `first` and `second` anything.
inline void encode_16(Floats m, Floats v, Integers noise, const Constants& c, Integers& first, Integers& second) {
  const __m512i v_bits = (__m512i)v;
  const Integers m_size = (Integers)_mm512_maskz_andnot_epi32(0xffff, (__m512i)c.sign, (__m512i)m);
  const __mmask16 special =
      _mm512_cmpgt_epu32_mask(_mm512_maskz_max_epu32(0xffff, v_bits, (__m512i)m_size), (__m512i)c.finite);
  if (__builtin_expect(special, 0)) return encode_moments(m, v, noise, first, second);
  const __m512i rounded = (__m512i)((((Integers)v_bits + (noise >> 11)) >> 21) - c.bias);
  const Integers code = (Integers)_mm512_maskz_min_epi32(_mm512_test_epi32_mask(v_bits, v_bits),
                                                         _mm512_maskz_max_epi32(0xffff, rounded, (__m512i)c.one),
                                                         (__m512i)c.largest_code);
  const __m512 in_units = (__m512)((Floats)m_size * (Floats)((c.exponent - (code >> 3)) << 23));
  const __mmask16 even = _mm512_cmp_ps_mask(in_units, (__m512)c.eighth, _CMP_LT_OQ);
  const Integers shifted = (Integers)_mm512_mask_add_ps(in_units, even, in_units, (__m512)c.eighth);
  const __m512i size = (__m512i)(((shifted + (noise & c.low_bits)) >> 20) - c.back);
  const __m512i size_of_m =
      _mm512_maskz_min_epi32(0xffff, _mm512_mask_sub_epi32(size, even, size, (__m512i)c.eight), (__m512i)c.most);
  first = (Integers)size_of_m | ((Integers)m >> 25 & c.sign_bit) | code << 7;
  second = code >> 1;
}

// Sixteen neighbours from the i-th on.
template <Rounding rounding, bool l2, bool amsgrad, bool by_age, typename P>
SAFEFREEZE_INLINE void adamw_coded_16(P* p, const P* g, uint8_t* m, uint8_t* v, uint8_t* x, uint16_t* extras,
                                      const float* step_size, const float* bias2_sqrt, int64_t i, Integers noise,
                                      const Constants& c, const Scalars& s) {
  Floats first, second, largest{};
  decode_16((Integers)load_16(m + i), (Integers)load_16(v + i), c, first, second);
  if (amsgrad) largest = (Floats)largest_bits_of((Integers)load_16(x + i));
  auto stored = read_16(p + i);
  Integers extra = rounding == Rounding::nearest ? Integers{} : read_16(extras + i);
  auto param = param_of<rounding>(stored, extra);
  if (by_age) {
    struct Own : Scalars {
      Floats step_size, bias2_sqrt;
    } own{s, read_16(step_size + i), read_16(bias2_sqrt + i)};
    adamw<l2, amsgrad>(param, value_of(read_16(g + i)), first, second, largest, own);
  } else {
    adamw<l2, amsgrad>(param, value_of(read_16(g + i)), first, second, largest, s);
  }
  keep_param<rounding>(param, stored, extra);
  store_16(bits_of(p + i), (__m512i)stored);
  if (rounding == Rounding::remainder) store_16(extras + i, (__m512i)extra);
  Integers one, other;
  noise = noise * c.noise_1;
  encode_16(first, second, (noise ^ noise >> 15) * c.noise_2, c, one, other);
  store_16(m + i, (__m512i)one);
  store_16(v + i, (__m512i)other);
  if (amsgrad) store_16(x + i, (__m512i)largest_code_of((Integers)largest));
}

#endif

template <typename P, Rounding rounding, bool l2, bool amsgrad, bool by_age>
void adamw_coded(const Elements& e, const Coding& coding, Scalars s) {
  P* __restrict p = static_cast<P*>(e.p);
  const P* __restrict g = static_cast<const P*>(e.g);
  uint8_t* __restrict m = static_cast<uint8_t*>(e.m);
  uint8_t* __restrict v = static_cast<uint8_t*>(e.v);
  uint8_t* __restrict x = static_cast<uint8_t*>(e.x);
  uint16_t* __restrict extras = e.extras;
  const float* __restrict step_size = by_age ? e.aged->step_size : nullptr;
  const float* __restrict bias2_sqrt = by_age ? e.aged->bias2_sqrt : nullptr;
#if defined(SAFEFREEZE_SIXTEEN)
  const Constants constants;
  Integers begin;
  for (uint32_t lane = 0; lane < 16; ++lane) begin[lane] = coding.begin + lane;
  int64_t i = 0;
  for (; i + 16 <= e.n; i += 16) {
    const auto later = [&](int64_t jump) { return i + ahead + (i < e.followed ? 0 : jump); };
    prefetch(p + later(e.p_jump));
    prefetch(g + later(e.g_jump));
    if (i % 64 == 0) {
      prefetch(m + later(e.state_jump));
      prefetch(v + later(e.state_jump));
    }
    const Integers noise = coding.noise ? (Integers)load_16(coding.noise + i) : begin + static_cast<uint32_t>(i);
    adamw_coded_16<rounding, l2, amsgrad, by_age>(p, g, m, v, x, extras, step_size, bias2_sqrt, i, noise, constants, s);
  }
  const size_t rest = static_cast<size_t>(e.n - i);
  if (rest == 0) return;
  // The last few where there is room for sixteen.
  alignas(64) P p_16[16] = {}, g_16[16] = {};
  alignas(64) uint8_t m_16[16] = {}, v_16[16] = {}, x_16[16] = {};
  alignas(64) uint16_t extras_16[16] = {};
  alignas(64) float step_size_16[16] = {}, bias2_sqrt_16[16] = {};
  const auto copy = [&](auto* to, const auto* from) { memcpy(to, from, rest * sizeof(*to)); };
  copy(p_16, p + i);
  copy(g_16, g + i);
  copy(m_16, m + i);
  copy(v_16, v + i);
  if (amsgrad) copy(x_16, x + i);
  if (rounding != Rounding::nearest) copy(extras_16, extras + i);
  if (by_age) {
    copy(step_size_16, step_size + i);
    copy(bias2_sqrt_16, bias2_sqrt + i);
  }
  const Integers noise = coding.noise ? (Integers)load_16(coding.noise + i) : begin + static_cast<uint32_t>(i);
  adamw_coded_16<rounding, l2, amsgrad, by_age>(p_16, g_16, m_16, v_16, x_16, extras_16, step_size_16, bias2_sqrt_16, 0,
                                                noise, constants, s);
  copy(p + i, p_16);
  copy(m + i, m_16);
  copy(v + i, v_16);
  if (amsgrad) copy(x + i, x_16);
  if (rounding == Rounding::remainder) copy(extras + i, extras_16);
#else
  const uint32_t* __restrict noise = coding.noise;
  const int64_t n = e.n;
  SAFEFREEZE_VECTOR_LOOP
  for (int64_t i = 0; i < n; ++i) {
    P p_i = p[i];
    uint16_t extra = rounding == Rounding::nearest ? uint16_t(0) : extras[i];
    Scalars own = s;
    if (by_age) {
      own.step_size = step_size[i];
      own.bias2_sqrt = bias2_sqrt[i];
    }
    float first, second, param = param_of<rounding>(p_i, extra);
    decode_moments<uint32_t>(m[i], v[i], first, second);
    float largest = amsgrad ? float_of(largest_bits_of<uint32_t>(x[i])) : second;
    adamw<l2, amsgrad>(param, value_of(g[i]), first, second, largest, own);
    keep_param<rounding>(param, p_i, extra);
    p[i] = p_i;
    uint32_t one, other;
    encode_moments(first, second, spread_noise(noise ? noise[i] : coding.begin + static_cast<uint32_t>(i)), one, other);
    m[i] = static_cast<uint8_t>(one);
    v[i] = static_cast<uint8_t>(other);
    if (amsgrad) x[i] = static_cast<uint8_t>(largest_code_of(bits_in(largest)));
    if (rounding == Rounding::remainder) extras[i] = extra;
  }
#endif
}

struct CodedMoments {
  using Block = void (*)(const Elements&, const Coding&, Scalars);
  template <typename P, Rounding rounding, bool l2, bool amsgrad, bool by_age>
  static constexpr Block block = adamw_coded<P, rounding, l2, amsgrad, by_age>;
};
