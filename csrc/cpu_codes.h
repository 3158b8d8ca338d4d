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
// |m| in its units times 2^64, which what `decode_16` multiplies by lacks, by the 6 bits that say so. As bfloat16.
struct Sizes {
  alignas(64) uint16_t of[64];
  constexpr Sizes() : of() {
    for (uint32_t size = 1; size < 62; ++size) {
      const uint32_t digits = size < 16 ? size : 8 + size % 8;
      uint32_t exponent = 185 + (size < 16 ? 0 : size / 8 - 1), fraction = digits << 7;
      for (; fraction >= 256; fraction >>= 1) ++exponent;
      of[size] = static_cast<uint16_t>(exponent << 7 | (fraction & 127u));
    }
    of[62] = 0x7f80;
    of[63] = 0x7fc0;
  }
};
constexpr Sizes sizes_of_m{};

// Constants that the compiler keeps in memory, if it has no register for them: it would otherwise put them together
// anew each time, where vectors are worked on.
struct Constants {
  Integers spread, widen, narrow, gather;  // of bytes, see `read_codes` and `write_codes`
  Integers v_code, v_field, bias, units, sign, largest_code, lowest_code, finite, one, exponent, low_bits, back, eight,
      sign_bit;
  Integers lanes, noise_of_16;
  Floats eighth, most;

  template <typename Vector, typename Value>
  static void set(Vector& to, Value value) {
    to = Vector{} + value;
    keep(to);
  }
  template <typename Vector>
  static void keep(Vector& vector) {
    asm("" : "+v"(vector));
  }

  Constants() {
    for (uint32_t i = 0; i < 16; ++i) {
      const uint32_t lane = i / 4, word = i % 4;
      lanes[i] = i;
      spread[i] = word < 2 ? 4 * word + lane : 0;
      widen[i] = 0x8080u | word << 16 | (4 + word) << 24;
      narrow[i] = 0x0c080400u + 0x01010101u * word;
      gather[i] = lane < 2 ? 4 * word + lane : 0;
    }
    keep(spread), keep(widen), keep(narrow), keep(gather), keep(lanes);
    set(v_code, 0xff800000u);
    set(v_field, 0x7fe00000u);
    set(bias, 128u << 21);
    set(units, 0x7f800000u);
    set(sign, 0x80000000u);
    set(largest_code, (510u << 23) - 1u);
    set(lowest_code, 128u);
    set(finite, 0x4f7fffffu);
    set(one, 1u);
    set(exponent, 174u);
    set(low_bits, 0xfffffu);
    set(back, 0u - (984u << 20));
    set(eight, 8u << 20);
    set(sign_bit, 64u);
    set(noise_of_16, spread_noise(16u));
    set(eighth, 0.125f);
    set(most, 12.0f);
  }
};

// The codes of sixteen neighbours, a word each from bit 16 on.
inline Integers read_codes(const uint8_t* m, const uint8_t* v, const Constants& c) {
  const __m256i bytes =
      _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(m))),
                              _mm_loadu_si128(reinterpret_cast<const __m128i*>(v)), 1);
  const __m512i fours = _mm512_maskz_permutexvar_epi32(0xffff, (__m512i)c.spread, _mm512_castsi256_si512(bytes));
  return (Integers)_mm512_shuffle_epi8(fours, (__m512i)c.widen);
}

// Of sixteen words their lowest 16 bits.
inline void write_codes(uint8_t* m, uint8_t* v, Integers words, const Constants& c) {
  const __m512i fours = _mm512_shuffle_epi8((__m512i)words, (__m512i)c.narrow);
  const __m512i bytes = _mm512_maskz_permutexvar_epi32(0xffff, (__m512i)c.gather, fours);
  memcpy(m, &bytes, 16);
  memcpy(v, reinterpret_cast<const char*>(&bytes) + 16, 16);
}

// `decode_moments` of words from `read_codes`, with fewer instructions. Which of them have a v that is infinite or NaN,
// for which it is wrong.
inline __mmask16 decode_16(Integers words, const Constants& c, Floats& m, Floats& v) {
  const Integers bits = (words >> 2 & c.v_field) + c.bias;
  v = (Floats)_mm512_maskz_mov_epi32(_mm512_test_epi32_mask((__m512i)words, (__m512i)c.v_code), (__m512i)bits);
  const auto sizes = [](int from) { return _mm512_load_si512(sizes_of_m.of + from); };
  const Floats size = (Floats)_mm512_permutex2var_epi16(sizes(0), (__m512i)words, sizes(32));
  m = (Floats)((Integers)(size * (Floats)(bits >> 1 & c.units)) | (words << 9 & c.sign));
  return _mm512_cmpgt_epu32_mask((__m512i)words, (__m512i)c.largest_code);
}

// `encode_moments` as words for `write_codes`, likewise. `beyond`: those for which it is wrong, of which one moment is
// near the largest there is a code for, or beyond.
inline Integers encode_16(Floats m, Floats v, Integers noise, const Constants& c, __mmask16& beyond) {
  const Integers v_bits = (Integers)v;
  const __m512i rounded = (__m512i)(((v_bits + (noise >> 11)) >> 21) - c.lowest_code);
  const Integers code = (Integers)_mm512_maskz_max_epi32(_mm512_test_epi32_mask((__m512i)v_bits, (__m512i)v_bits),
                                                         rounded, (__m512i)c.one);
  const Floats m_size = (Floats)_mm512_maskz_andnot_epi32(0xffff, (__m512i)c.sign, (__m512i)m);
  const Floats in_units = m_size * (Floats)((c.exponent - (code >> 3)) << 23);
  beyond = _kor_mask16(_mm512_cmpgt_epu32_mask((__m512i)v_bits, (__m512i)c.finite),
                       _mm512_cmp_ps_mask((__m512)in_units, (__m512)c.most, _CMP_NLT_UQ));
  const Integers even = (Integers)(in_units + c.eighth) - c.eight;
  const Integers size = (Integers)_mm512_maskz_max_epu32(0xffff, (__m512i)in_units, (__m512i)even);
  return (size + ((noise & c.low_bits) | c.back)) >> 20 | ((Integers)m >> 25 & c.sign_bit) | code << 7;
}

// Sixteen neighbours from the i-th on; in `aged` they begin at `at`.
template <Rounding rounding, bool l2, bool amsgrad, bool by_age, typename P>
SAFEFREEZE_INLINE void adamw_coded_16(P* p, const P* g, uint8_t* m, uint8_t* v, uint8_t* x, uint16_t* extras, int64_t i,
                                      const Aged* aged, int64_t at, Integers noise, const Constants& c,
                                      const Scalars& s) {
  const Integers words = read_codes(m + i, v + i, c);
  auto stored = read_16(p + i);
  Integers extra = rounding == Rounding::nearest ? Integers{} : read_16(extras + i);
  Floats param, first, second, largest;
  const auto update = [&] {
    param = param_of<rounding>(stored, extra);
    largest = amsgrad ? (Floats)largest_bits_of((Integers)load_16(x + i)) : second;
    const Floats gradient = value_of(read_16(g + i));
    if (by_age) {
      adamw<l2, amsgrad>(param, gradient, first, second, largest, aged->of_16(at, s));
    } else {
      adamw<l2, amsgrad>(param, gradient, first, second, largest, s);
    }
  };
  const __mmask16 special = decode_16(words, c, first, second);
  update();
  __mmask16 beyond;
  Integers now = encode_16(first, second, noise, c, beyond);
  if (__builtin_expect(!_kortestz_mask16_u8(special, beyond), 0)) {
    decode_moments<Integers>(words >> 16 & 0xffu, words >> 24, first, second);
    update();
    Integers one, other;
    encode_moments(first, second, noise, one, other);
    now = one | other << 8;
  }
  keep_param<rounding>(param, stored, extra);
  store_16(bits_of(p + i), (__m512i)stored);
  if (rounding == Rounding::remainder) store_16(extras + i, (__m512i)extra);
  write_codes(m + i, v + i, now, c);
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
#if defined(SAFEFREEZE_SIXTEEN)
  const Constants constants;
  Integers following = spread_noise(constants.lanes + coding.begin);
  const auto noise_from = [&](int64_t i) {
    return coding.noise ? spread_noise((Integers)load_16(coding.noise + i)) : following;
  };
  int64_t i = 0;
  for (; i + 16 <= e.n; i += 16) {
    // An element has fewer bytes here, and is done sooner.
    const auto later = [&](int64_t jump) { return i + 2 * ahead + (i < e.followed - ahead ? 0 : jump); };
    prefetch(p + later(e.p_jump));
    prefetch(g + later(e.g_jump));
    if (i % 64 == 0) {
      prefetch(m + later(e.state_jump));
      prefetch(v + later(e.state_jump));
    }
    adamw_coded_16<rounding, l2, amsgrad, by_age>(p, g, m, v, x, extras, i, e.aged, i, noise_from(i), constants, s);
    following += constants.noise_of_16;
  }
  const size_t rest = static_cast<size_t>(e.n - i);
  if (rest == 0) return;
  // The last few where there is room for sixteen.
  alignas(64) P p_16[16] = {}, g_16[16] = {};
  alignas(64) uint8_t m_16[16] = {}, v_16[16] = {}, x_16[16] = {};
  alignas(64) uint16_t extras_16[16] = {};
  const auto copy = [&](auto* to, const auto* from) { memcpy(to, from, rest * sizeof(*to)); };
  copy(p_16, p + i);
  copy(g_16, g + i);
  copy(m_16, m + i);
  copy(v_16, v + i);
  if (amsgrad) copy(x_16, x + i);
  if (rounding != Rounding::nearest) copy(extras_16, extras + i);
  adamw_coded_16<rounding, l2, amsgrad, by_age>(p_16, g_16, m_16, v_16, x_16, extras_16, 0, e.aged, i, noise_from(i),
                                                constants, s);
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
    float first, second, param = param_of<rounding>(p_i, extra);
    decode_moments<uint32_t>(m[i], v[i], first, second);
    float largest = amsgrad ? float_of(largest_bits_of<uint32_t>(x[i])) : second;
    if (by_age) {
      adamw<l2, amsgrad>(param, value_of(g[i]), first, second, largest, e.aged->of(i, s));
    } else {
      adamw<l2, amsgrad>(param, value_of(g[i]), first, second, largest, s);
    }
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
