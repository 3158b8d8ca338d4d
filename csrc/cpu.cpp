// AdamW, norms and scaling: loops over work.h calling arithmetic.h. Compiled once per instruction set (SAFEFREEZE_ISA
// names it).
//
// Everything is staged through a block of float32 that stays in the first-level cache: storage types are converted
// and columns gathered on the way in, undone on the way out, and one arithmetic loop serves them all. Contiguous
// float32 is worked on in place.
#include "places.h"

namespace safefreeze {
namespace {

// ------------------------------------------------------------------------------------------------ the operations

// Float32 is worked on as float, bfloat16 as its bits; float16 is staged as float.
inline float value_of(float stored) { return stored; }
inline float value_of(uint16_t stored) { return from_bf16(stored); }
inline void keep(float value, float& stored) { stored = value; }
inline void keep(float value, uint16_t& stored) { stored = to_bf16(value); }

// How a bf16 parameter is rounded; `extra` is its noise or its remainder.
enum class Rounding { nearest, stochastic, remainder };

template <Rounding rounding>
inline float param_of(float stored, uint16_t) {
  return stored;
}
template <Rounding rounding>
inline float param_of(uint16_t stored, uint16_t extra) {
  return rounding == Rounding::remainder ? from_remainder(stored, extra) : from_bf16(stored);
}
template <Rounding rounding>
inline void keep_param(float value, float& stored, uint16_t&) {
  stored = value;
}
template <Rounding rounding>
inline void keep_param(float value, uint16_t& stored, uint16_t& extra) {
  stored = rounding == Rounding::remainder    ? to_remainder(value, extra)
           : rounding == Rounding::stochastic ? to_bf16(value, extra)
                                              : to_bf16(value);
}

#if defined(SAFEFREEZE_SIXTEEN)
// The same of sixteen in registers, where bits of bfloat16 and of extras are words.
inline Floats value_of(Floats stored) { return stored; }
inline Floats value_of(Integers stored) { return (Floats)(stored << 16); }
inline void keep(Floats value, Floats& stored) { stored = value; }
inline void keep(Floats value, Integers& stored) { stored = bf16_of((Integers)value); }

template <Rounding rounding>
inline Floats param_of(Floats stored, Integers) {
  return stored;
}
template <Rounding rounding>
inline Floats param_of(Integers stored, Integers extra) {
  return rounding == Rounding::remainder ? (Floats)master_of(stored, extra) : value_of(stored);
}
template <Rounding rounding>
inline void keep_param(Floats value, Floats& stored, Integers&) {
  stored = value;
}
template <Rounding rounding>
inline void keep_param(Floats value, Integers& stored, Integers& extra) {
  stored = rounding == Rounding::remainder    ? split_master((Integers)value, extra)
           : rounding == Rounding::stochastic ? bf16_of((Integers)value, extra)
                                              : bf16_of((Integers)value);
}

inline Floats read_16(const float* data) { return (Floats)load_16(bits_of(data)); }
inline Integers read_16(const uint16_t* data) { return (Integers)load_16(data); }
inline Floats read_some(const float* data, __mmask16 some) { return (Floats)load_some(bits_of(data), some); }
inline Integers read_some(const uint16_t* data, __mmask16 some) { return (Integers)load_some(data, some); }

// Writes those that are `live` of sixteen. `whole`: of the others the bits that `data` has, which are those of `was`.
template <bool whole, typename T, typename Sixteen>
inline void write_16(T* data, __mmask16 live, Sixteen was, Sixteen now) {
  if (whole) {
    store_16(bits_of(data), _mm512_mask_blend_epi32(live, (__m512i)was, (__m512i)now));
  } else {
    store_some(bits_of(data), live, (__m512i)now);
  }
}
#endif

// One element, or sixteen in registers, as they are stored.
template <Rounding rounding, bool l2, bool amsgrad, typename P, typename S, typename Extra, typename Own>
SAFEFREEZE_INLINE void adamw_stored(P& p, P g, S& m, S& v, S& x, Extra& extra, const Own& s) {
  auto param = param_of<rounding>(p, extra);
  auto first = value_of(m), second = value_of(v), largest = amsgrad ? value_of(x) : second;
  adamw<l2, amsgrad>(param, value_of(g), first, second, largest, s);
  keep_param<rounding>(param, p, extra);
  keep(first, m);
  keep(second, v);
  if (amsgrad) keep(largest, x);
}

// What depends on age, of each element of a block.
struct Aged {
  float step_size[block + slack], bias2_sqrt[block + slack], reciprocal[block + slack];
  uint32_t step[block];  // of stochastic rounding

  AgedScalars<float> of(int64_t i, const Scalars& s) const { return {s, step_size[i], bias2_sqrt[i], reciprocal[i]}; }
#if defined(SAFEFREEZE_SIXTEEN)
  AgedScalars<Floats> of_16(int64_t i, const Scalars& s) const {
    return {s, read_16(step_size + i), read_16(bias2_sqrt + i), read_16(reciprocal + i)};
  }
#endif
};

// What a step works on: `n` elements side by side, each operand float32 or bfloat16.
struct Elements {
  void* p;
  const void* g;
  void *m, *v, *x;
  uint16_t* extras;
  const Aged* aged;
  Bits live;  // which of them are to be stepped; the others stay as they are. Without bytes: all are
  int64_t n;
  int64_t followed;  // how many have elements of the same stretch `ahead` of them
  // From the end of their stretch to the next one. If there is none, what is at hand is fetched once more.
  int64_t p_jump = -ahead, g_jump = -ahead, state_jump = -ahead;
};

#if defined(SAFEFREEZE_SIXTEEN)
// Those of sixteen neighbours that are `live`. `whole`: all lie within the block. Whatever is computed of the others is
// dropped.
template <bool whole, Rounding rounding, bool l2, bool amsgrad, bool by_age, typename P, typename S>
SAFEFREEZE_INLINE void adamw_16(P* p, const P* g, S* m, S* v, S* x, uint16_t* extras, const Aged* aged, int64_t i,
                                uint32_t live, const Scalars& s) {
  const auto read = [&](const auto* data) { return whole ? read_16(data + i) : read_some(data + i, live); };
  const auto p_was = read(p);
  const auto m_was = read(m), v_was = read(v);
  auto p_now = p_was;
  auto m_now = m_was, v_now = v_was, x_now = amsgrad ? read(x) : m_was;
  const Integers extra_was = rounding == Rounding::nearest ? Integers{} : read(extras);
  const auto x_was = x_now;
  Integers extra_now = extra_was;
  if (by_age) {
    adamw_stored<rounding, l2, amsgrad>(p_now, read(g), m_now, v_now, x_now, extra_now, aged->of_16(i, s));
  } else {
    adamw_stored<rounding, l2, amsgrad>(p_now, read(g), m_now, v_now, x_now, extra_now, s);
  }
  write_16<whole>(p + i, live, p_was, p_now);
  write_16<whole>(m + i, live, m_was, m_now);
  write_16<whole>(v + i, live, v_was, v_now);
  if (amsgrad) write_16<whole>(x + i, live, x_was, x_now);
  if (rounding == Rounding::remainder) write_16<whole>(extras + i, live, extra_was, extra_now);
}
#endif

template <typename P, typename S, Rounding rounding, bool l2, bool amsgrad, bool by_age>
void adamw_block(const Elements& e, Scalars s) {
  P* __restrict p = static_cast<P*>(e.p);
  const P* __restrict g = static_cast<const P*>(e.g);
  S* __restrict m = static_cast<S*>(e.m);
  S* __restrict v = static_cast<S*>(e.v);
  S* __restrict x = static_cast<S*>(e.x);
  uint16_t* __restrict extras = e.extras;
  const int64_t n = e.n;
#if defined(SAFEFREEZE_SIXTEEN)
  const Bits some = e.live;
  const int64_t followed = e.followed;
  for (int64_t i = 0; i < n; i += 16) {
    uint32_t live = some.bytes ? some.sixteen(i) : 0xffffu;
    const auto later = [&](int64_t jump) { return i + ahead + (i < followed ? 0 : jump); };
    prefetch(p + later(e.p_jump));
    prefetch(g + later(e.g_jump));
    prefetch(m + later(e.state_jump));
    prefetch(v + later(e.state_jump));
    if (i + 16 <= n) {
      if (live) adamw_16<true, rounding, l2, amsgrad, by_age>(p, g, m, v, x, extras, e.aged, i, live, s);
    } else if (live &= (1u << (n - i)) - 1u) {
      adamw_16<false, rounding, l2, amsgrad, by_age>(p, g, m, v, x, extras, e.aged, i, live, s);
    }
  }
#else
  SAFEFREEZE_VECTOR_LOOP
  for (int64_t i = 0; i < n; ++i) {
    P p_i = p[i];
    S m_i = m[i], v_i = v[i], x_i = amsgrad ? x[i] : m_i;
    uint16_t extra = rounding == Rounding::nearest ? uint16_t(0) : extras[i];
    if (by_age) {
      adamw_stored<rounding, l2, amsgrad>(p_i, g[i], m_i, v_i, x_i, extra, e.aged->of(i, s));
    } else {
      adamw_stored<rounding, l2, amsgrad>(p_i, g[i], m_i, v_i, x_i, extra, s);
    }
    p[i] = p_i;
    m[i] = m_i;
    v[i] = v_i;
    if (amsgrad) x[i] = x_i;
    if (rounding == Rounding::remainder) extras[i] = extra;
  }
#endif
}

// Steps whose moments are kept as S: float32, or the bits of bfloat16.
template <typename S>
struct Stored {
  using Block = void (*)(const Elements&, Scalars);
  template <typename P, Rounding rounding, bool l2, bool amsgrad, bool by_age>
  static constexpr Block block = adamw_block<P, S, rounding, l2, amsgrad, by_age>;
};

template <typename Moments, typename P, Rounding rounding>
typename Moments::Block choose_flags(bool l2, bool amsgrad, bool by_age) {
  static constexpr typename Moments::Block blocks[2][2][2] = {
      {{Moments::template block<P, rounding, false, false, false>,
        Moments::template block<P, rounding, false, false, true>},
       {Moments::template block<P, rounding, false, true, false>,
        Moments::template block<P, rounding, false, true, true>}},
      {{Moments::template block<P, rounding, true, false, false>,
        Moments::template block<P, rounding, true, false, true>},
       {Moments::template block<P, rounding, true, true, false>,
        Moments::template block<P, rounding, true, true, true>}},
  };
  return blocks[l2][amsgrad][by_age];
}

template <typename Moments>
typename Moments::Block choose_block(bool bf16, Rounding rounding, bool l2, bool amsgrad, bool by_age) {
  const auto choose = !bf16                              ? choose_flags<Moments, float, Rounding::nearest>
                      : rounding == Rounding::remainder  ? choose_flags<Moments, uint16_t, Rounding::remainder>
                      : rounding == Rounding::stochastic ? choose_flags<Moments, uint16_t, Rounding::stochastic>
                                                         : choose_flags<Moments, uint16_t, Rounding::nearest>;
  return choose(l2, amsgrad, by_age);
}

// A block's operand as float32 or bfloat16: where it lies, if its elements lie together there, else its stage.
struct Operand {
  void* data;
  bool bf16, staged;
};

Operand operand(DType dtype, int64_t address, const Place& place, int64_t n, float* stage) {
  if (dtype == DType::bf16) {
    uint16_t* data = at<uint16_t>(address);
    if (place.together()) return {data + place.start, true, false};
    uint16_t* staged = reinterpret_cast<uint16_t*>(stage);
    pick(data, place, n, staged);
    return {staged, true, true};
  }
  if (dtype == DType::f32 && place.together()) return {at<float>(address) + place.start, false, false};
  load(dtype, address, place, n, stage);
  return {stage, false, true};
}

void put_back(const Operand& operand, DType dtype, int64_t address, const Place& place, int64_t n,
              const uint16_t* noise = nullptr) {
  if (!operand.staged) return;
  if (operand.bf16) {
    put(static_cast<const uint16_t*>(operand.data), n, at<uint16_t>(address), place);
  } else {
    store(dtype, static_cast<const float*>(operand.data), n, address, place, noise);
  }
}

// `n_ages` rows; `ages` are readable as far as slack goes.
template <typename Index>
void spread(const Index* ages, int64_t n, const Scalars* rows, int64_t n_ages, Aged& aged) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if (n_ages <= 32) {  // in registers
    alignas(64) float step_size[32] = {}, bias2_sqrt[32] = {};
    for (int64_t age = 0; age < n_ages; ++age) {
      step_size[age] = rows[age].step_size;
      bias2_sqrt[age] = rows[age].bias2_sqrt;
    }
    const __m512 step_size_low = _mm512_load_ps(step_size), step_size_high = _mm512_load_ps(step_size + 16);
    const __m512 bias2_sqrt_low = _mm512_load_ps(bias2_sqrt), bias2_sqrt_high = _mm512_load_ps(bias2_sqrt + 16);
    const __m512 reciprocal_low = _mm512_set1_ps(1.0f) / bias2_sqrt_low;
    const __m512 reciprocal_high = _mm512_set1_ps(1.0f) / bias2_sqrt_high;
    for (int64_t i = 0; i < n; i += 16) {
      const __m512i age = load_16(ages + i);
      _mm512_storeu_ps(aged.step_size + i, _mm512_permutex2var_ps(step_size_low, age, step_size_high));
      _mm512_storeu_ps(aged.bias2_sqrt + i, _mm512_permutex2var_ps(bias2_sqrt_low, age, bias2_sqrt_high));
      _mm512_storeu_ps(aged.reciprocal + i, _mm512_permutex2var_ps(reciprocal_low, age, reciprocal_high));
    }
    return;
  }
#endif
  (void)n_ages;
  for (int64_t i = 0; i < n; ++i) {
    const Scalars& row = rows[ages[i]];
    aged.step_size[i] = row.step_size;
    aged.bias2_sqrt[i] = row.bias2_sqrt;
    aged.reciprocal[i] = reciprocal_of(row);
  }
}

template <typename Index>
void look_up(const RunPart& part, const Place& packed, int64_t n, const Scalars* rows, bool steps, Aged& aged) {
  Index picked[block + slack];
  const Index* ages = at<const Index>(part.ages) + packed.start;
  if (!packed.together()) {
    pick(at<const Index>(part.ages), packed, n, picked);
    ages = picked;
  }
  spread(ages, n, rows, part.n_ages, aged);
  for (int64_t i = 0; steps && i < n; ++i) aged.step[i] = rows[ages[i]].step;
}

// Calls `take(i, element)` for each element of a block, in order.
template <typename Take>
void each_element(const Place& place, int64_t n, Take take) {
  if (place.together()) {
    for (int64_t i = 0; i < n; ++i) take(i, static_cast<uint64_t>(place.start + i));
  } else if (!place.cols) {
    int64_t i = 0;
    place.bits.each([&](int64_t neighbour) { take(i++, static_cast<uint64_t>(place.start + neighbour)); });
  } else {
    for (int64_t done = 0, row = 0; done < n; done += place.picks, ++row) {
      for (int64_t i = 0; i < place.picks; ++i) {
        take(done + i, static_cast<uint64_t>(place.row_start(row) + place.cols[i]));
      }
    }
  }
}

// The noise of a block's elements, which took `step` steps or, each by itself, those of `aged`.
void make_noise(uint64_t seed, uint32_t step, const Aged* aged, uint32_t number, const Place& place, int64_t n,
                uint16_t* noise) {
  uint64_t group = ~uint64_t(0);
  uint32_t of_step = 0;
  Words eight{};
  each_element(place, n, [&](int64_t i, uint64_t element) {
    const uint32_t now = aged ? aged->step[i] : step;
    if (element / 8 != group || now != of_step) {
      eight = noise_of_eight(seed, of_step = now, number, group = element / 8);
    }
    noise[i] = noise_of(eight, element);
  });
}

#include "cpu_codes.h"

#if defined(SAFEFREEZE_SIXTEEN)
// Single elements of float32 or bfloat16, rounded to nearest or with remainders, without a block's preparations. State
// without gaps meets what is picked of p and g, a few hundred at a time: while their divisions are under way the next
// are picked. Where state lies as its tensor does nothing is picked, and what is frozen is stepped over in place.
template <typename P>
void adamw_singles(const AdamWLaunch& launch, const Chunk& chunk, const AdamWTensor& tensor, int64_t grad) {
  constexpr int64_t few = 256;
  alignas(64) P p_picked[few + slack], g_picked[few + slack];
  alignas(64) Aged aged;
  const RunPart& part = launch.work.parts[chunk.part];
  const Scalars* const rows = launch.scalars + launch.scalar_set[chunk.part];
  const bool bf16 = launch.state_dtype[part.tensor] == static_cast<int32_t>(DType::bf16), gapless = part.gapless != 0;
  const auto step =
      (bf16 ? choose_block<Stored<uint16_t>>
            : choose_block<Stored<float>>)(sizeof(P) == 2, tensor.remainder ? Rounding::remainder : Rounding::nearest,
                                           launch.l2, launch.amsgrad, part.ages != 0);
  for (int64_t r = chunk.begin; r < chunk.end; ++r) {
    const Run& run = launch.work.runs[r];
    P* p = at<P>(tensor.param) + run.start;
    const P* g = at<const P>(grad) + run.start;
    Bits bits = visited(part, run.start, launch.work.frozen);
    for (int64_t packed = run.packed, left = run.count; left;) {
      bits.span = left < block ? left : block;
      const auto state = [&](int64_t address) -> void* { return at<char>(address + packed * (bf16 ? 2 : 4)); };
      Elements e{p,
                 g,
                 state(tensor.exp_avg),
                 state(tensor.exp_avg_sq),
                 state(tensor.max_exp_avg_sq),
                 at<uint16_t>(tensor.remainder + packed * 2),
                 &aged,
                 bits,
                 bits.span,
                 left - ahead};
      if (gapless) {
        bits.span = 0;
        e.n = bits.grow(left, few);
        e.live = {};
      }
      const bool picked = e.n < bits.span;
      if (picked) {
        pick_by_bits(bits, left - ahead, Pick{bits_of(p), bits_of(p_picked)}, Pick{bits_of(g), bits_of(g_picked)});
        e.p = p_picked;
        e.g = g_picked;
      }
      if (part.ages) {
        const Place here{packed};
        (part.age_size == 1 ? look_up<uint8_t> : look_up<uint16_t>)(part, here, e.n, rows, false, aged);
      }
      step(e, *rows);
      if (picked) put_by_bits(bits_of(p_picked), bits, bits_of(p));
      packed += e.n;
      p += bits.span;
      g += bits.span;
      left -= bits.span;
      bits.first += bits.span;
    }
  }
}

// Whether a chunk was one of `adamw_singles`, which are done then.
bool done_as_singles(const AdamWLaunch& launch, const Chunk& chunk) {
  const RunPart& part = launch.work.parts[chunk.part];
  const AdamWTensor& tensor = launch.tensors[part.tensor];
  const DType dtype = static_cast<DType>(launch.param_dtype[part.tensor]);
  const bool stochastic = launch.stochastic && dtype == DType::bf16 && !tensor.remainder;
  const bool codes = launch.state_dtype[part.tensor] == static_cast<int32_t>(DType::codes);
  if (!part.frozen_bits || part.shared || tensor.packed_grad || stochastic || dtype == DType::f16 || codes)
    return false;
  const int64_t grad = launch.grads[part.tensor].data;
  if (grad) (dtype == DType::f32 ? adamw_singles<float> : adamw_singles<uint16_t>)(launch, chunk, tensor, grad);
  return true;
}
#endif

void adamw_chunk(const AdamWLaunch& launch, int64_t chunk) {
#if defined(SAFEFREEZE_SIXTEEN)
  if (done_as_singles(launch, launch.work.chunks[chunk])) return;
#endif
  alignas(64) Stage stage[6];
  alignas(64) Aged aged;
  Codes coded;
  walk(launch.work, chunk, [&](const Block& b) {
    const AdamWTensor& tensor = launch.tensors[b.part.tensor];
    const int64_t grad = launch.grads[b.part.tensor].data;
    if (grad == 0) return;
    const DType dtype = static_cast<DType>(launch.param_dtype[b.part.tensor]);
    const DType state = static_cast<DType>(launch.state_dtype[b.part.tensor]);
    const Scalars* const rows = launch.scalars + launch.scalar_set[b.part_index] + b.age;
    const Aged* const by_age = b.part.ages ? &aged : nullptr;
    const bool stochastic = launch.stochastic && dtype != DType::f32 && !tensor.remainder;
    const bool codes = state == DType::codes;
    if (by_age) {
      (b.part.age_size == 1 ? look_up<uint8_t> : look_up<uint16_t>)(b.part, b.packed, b.n, rows, stochastic || codes,
                                                                    aged);
    }
    const Operand p = operand(dtype, tensor.param, b.place, b.n, stage[0]);
    const Place& g_place = tensor.packed_grad ? b.packed : b.place;
    const Operand g = operand(dtype, grad, g_place, b.n, stage[1]);
    const auto moment = [&](int64_t address, float* staged, uint8_t* staged_codes) {
      if (codes) return Operand{codes_of(address, b.packed, b.n, staged_codes), false, false};
      return operand(state, address, b.packed, b.n, staged);
    };
    const Operand m = moment(tensor.exp_avg, stage[2], coded.m);
    const Operand v = moment(tensor.exp_avg_sq, stage[3], coded.v);
    const Operand x =
        launch.amsgrad ? moment(tensor.max_exp_avg_sq, stage[4], coded.x) : Operand{nullptr, false, false};
    Operand extra{nullptr, true, false};
    Rounding rounding = Rounding::nearest;
    if (tensor.remainder) {
      rounding = Rounding::remainder;
      extra = operand(DType::bf16, tensor.remainder, b.packed, b.n, stage[5]);
    } else if (stochastic) {
      rounding = Rounding::stochastic;
      extra.data = stage[5];
      make_noise(launch.seed, rows->step, by_age, static_cast<uint32_t>(tensor.number), b.place, b.n,
                 static_cast<uint16_t*>(extra.data));
    }
    const auto choose = m.bf16 ? choose_block<Stored<uint16_t>> : choose_block<Stored<float>>;
    uint16_t* const extras = static_cast<uint16_t*>(extra.data);
    const int64_t followed = p.staged ? b.n : b.place.followed;
    const Elements elements{p.data, g.data, m.data,   v.data,       x.data,       extras,       by_age,
                            Bits{}, b.n,    followed, b.place.jump, g_place.jump, b.packed.jump};
    if (codes) {
      Coding coding{};
      coding.noise = make_moment_noise(launch.seed, rows->step, by_age, static_cast<uint32_t>(tensor.number), b.place,
                                       b.n, coded.noise, coding.begin);
      choose_block<CodedMoments>(p.bf16, rounding, launch.l2, launch.amsgrad, by_age != nullptr)(elements, coding,
                                                                                                 *rows);
      put_codes(m.data, b, tensor.exp_avg);
      put_codes(v.data, b, tensor.exp_avg_sq);
      if (launch.amsgrad) put_codes(x.data, b, tensor.max_exp_avg_sq);
    } else {
      choose(p.bf16, rounding, launch.l2, launch.amsgrad, by_age != nullptr)(elements, *rows);
    }
    put_back(p, dtype, tensor.param, b.place, b.n, rounding == Rounding::stochastic ? extras : nullptr);
    put_back(m, state, tensor.exp_avg, b.packed, b.n);
    put_back(v, state, tensor.exp_avg_sq, b.packed, b.n);
    put_back(x, state, tensor.max_exp_avg_sq, b.packed, b.n);
    put_back(extra, DType::bf16, tensor.remainder, b.packed, b.n);
  });
}

// A fixed number of running results, whatever the vector width, so that every instruction set adds in one order.
constexpr int lanes = 16;

template <NormKind kind>
double accumulate(double so_far, float value) {
  const double x = static_cast<double>(value);
  if (kind == NormKind::sum_of_squares) return so_far + x * x;
  const double magnitude = x < 0 ? -x : x;
  if (kind == NormKind::sum_of_absolutes) return so_far + magnitude;
  return (magnitude > so_far || magnitude != magnitude) ? magnitude : so_far;
}

template <NormKind kind>
void norm_block(const float* values, int64_t n, double* running) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int lane = 0; lane < lanes; ++lane) {
      running[lane] = accumulate<kind>(running[lane], values[i + lane]);
    }
  }
  for (int lane = 0; i < n; ++i, ++lane) running[lane] = accumulate<kind>(running[lane], values[i]);
}

// Calls `take(block, dtype, address, view)` for each block of the tensors that are there.
template <typename Launch, typename Take>
void each_view(const Launch& launch, int64_t chunk, Take take) {
  alignas(64) Stage stage;
  walk(launch.work, chunk, [&](const Block& b) {
    const int64_t address = launch.tensors[b.part.tensor].data;
    const DType dtype = static_cast<DType>(launch.dtype[b.part.tensor]);
    if (address) take(b, dtype, address, view(dtype, address, b.place, b.n, stage));
  });
}

void norm_chunk(const NormLaunch& launch, int64_t chunk) {
  double running[lanes] = {};
  each_view(launch, chunk, [&](const Block& b, DType, int64_t, const View& g) {
    switch (launch.kind) {
      case NormKind::sum_of_squares:
        return norm_block<NormKind::sum_of_squares>(g.values, b.n, running);
      case NormKind::sum_of_absolutes:
        return norm_block<NormKind::sum_of_absolutes>(g.values, b.n, running);
      case NormKind::largest_absolute:
        return norm_block<NormKind::largest_absolute>(g.values, b.n, running);
    }
  });
  double total = running[0];
  for (int lane = 1; lane < lanes; ++lane) {
    if (launch.kind != NormKind::largest_absolute) {
      total += running[lane];
    } else if (running[lane] > total || running[lane] != running[lane]) {
      total = running[lane];
    }
  }
  launch.partial[chunk] = total;
}

void scale_chunk(const ScaleLaunch& launch, int64_t chunk) {
  each_view(launch, chunk, [&](const Block& b, DType dtype, int64_t address, const View& g) {
    for (int64_t i = 0; i < b.n; ++i) g.values[i] = g.values[i] * launch.factor;
    if (g.staged) store(dtype, g.values, b.n, address, b.place);
  });
}

}  // namespace

const CpuKernels SAFEFREEZE_JOIN(cpu_kernels_, SAFEFREEZE_ISA) = {
    SAFEFREEZE_TEXT(SAFEFREEZE_ISA),
    adamw_chunk,
    norm_chunk,
    scale_chunk,
    SAFEFREEZE_JOIN(zero_, SAFEFREEZE_ISA),
    SAFEFREEZE_JOIN(copy_, SAFEFREEZE_ISA),
    SAFEFREEZE_JOIN(count_clear_, SAFEFREEZE_ISA),
    SAFEFREEZE_JOIN(repack_, SAFEFREEZE_ISA),
    SAFEFREEZE_JOIN(turn_, SAFEFREEZE_ISA),
    SAFEFREEZE_JOIN(compare_, SAFEFREEZE_ISA),
};

}  // namespace safefreeze
