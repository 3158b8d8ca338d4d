// Loops over work.h calling arithmetic.h. Compiled once per instruction set (SAFEFREEZE_ISA names it); includes no
// standard C++ header with inline code, which the linker could otherwise take from the wrong instruction set.
//
// Everything is staged through a block of float32 that stays in the first-level cache: storage types are converted
// and columns gathered on the way in, undone on the way out, and one arithmetic loop serves them all. Contiguous
// float32 is worked on in place.
#include <string.h>

#include "cpu.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace safefreeze {
namespace {

constexpr int64_t block = 1024;

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

int64_t width(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// ------------------------------------------------------------------------------------------- picking columns

// Where a block lies: `n` elements from element `start`; or, with `cols`, `picks` columns of the row that begins there,
// or of each of the rows that begin where `rows` say. The same picks as bits (`col_bits`, one per column) cover the
// window [from, to) of a row, where columns are not too sparse for that.
struct Place {
  int64_t start;
  const int32_t* cols = nullptr;
  const uint16_t* col_bits = nullptr;
  int64_t from = 0, to = 0;
  const Run* rows = nullptr;
  int64_t picks = 0;
  int64_t n_rows = 0;   // rows from `rows` on in this chunk: more than the block has, if others follow
  bool shared = false;  // other threads may be writing to the elements between: touch none but one's own

  int64_t row_start(int64_t row) const { return rows ? rows[row].start : start; }
  // The row to fetch while `row` is picked: two ahead, since hardware prefetchers lose their way among picks (Zen 5).
  int64_t row_to_fetch(int64_t row) const { return row_start(row + 2 < n_rows ? row + 2 : row); }
};

template <typename T>
inline void prefetch(const T* data) {
#if defined(__GNUC__)
  __builtin_prefetch(data);
#else
  (void)data;
#endif
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
// Sixteen neighbours at a time. Whole vectors are loaded, blended and stored: masked ones run three times slower once
// the data comes from memory (measured on Zen 5). Only the last, short vector of a row is masked, to stay inside the
// row.
inline __m512i load_16(const uint32_t* data) { return _mm512_loadu_si512(data); }
inline __m512i load_16(const uint16_t* data) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
}
inline __m512i load_some(const uint32_t* data, __mmask16 some) { return _mm512_maskz_loadu_epi32(some, data); }
inline __m512i load_some(const uint16_t* data, __mmask16 some) {
  return _mm512_maskz_cvtepu16_epi32(some, _mm256_maskz_loadu_epi16(some, data));
}
inline void store_16(uint32_t* data, __m512i values) { _mm512_storeu_si512(data, values); }
inline void store_16(uint16_t* data, __m512i values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), _mm512_maskz_cvtepi32_epi16(0xffff, values));
}
inline void store_some(uint32_t* data, __mmask16 some, __m512i values) { _mm512_mask_storeu_epi32(data, some, values); }
inline void store_some(uint16_t* data, __mmask16 some, __m512i values) {
  _mm256_mask_storeu_epi16(data, some, _mm512_maskz_cvtepi32_epi16(0xffff, values));
}
constexpr bool picks_by_bits = true;
constexpr int64_t slack = 16;  // whole vectors are written past the last pick

template <typename T>
void pick_by_bits(const T* row, Place place, T* out) {
  int64_t col = place.from;
  for (; col + 16 <= place.to; col += 16) {
    const __mmask16 picked = place.col_bits[col / 16];
    store_16(out, _mm512_maskz_compress_epi32(picked, load_16(row + col)));
    out += __builtin_popcount(picked);
  }
  if (col < place.to) {
    const __mmask16 picked = place.col_bits[col / 16];
    store_16(out, _mm512_maskz_compress_epi32(picked, load_some(row + col, picked)));
  }
}

template <typename T>
void put_by_bits(const T* values, Place place, T* row) {
  int64_t col = place.from;
  for (; col + 16 <= place.to; col += 16) {
    const __mmask16 picked = place.col_bits[col / 16];
    store_16(row + col, _mm512_mask_expand_epi32(load_16(row + col), picked, load_16(values)));
    values += __builtin_popcount(picked);
  }
  if (col < place.to) {
    const __mmask16 picked = place.col_bits[col / 16];
    store_some(row + col, picked, _mm512_maskz_expand_epi32(picked, load_16(values)));
  }
}
#else
constexpr bool picks_by_bits = false;
constexpr int64_t slack = 0;
template <typename T>
void pick_by_bits(const T*, Place, T*) {}
template <typename T>
void put_by_bits(const T*, Place, T*) {}
#endif

// Hardware gathers and scatters are slower than plain loads and stores on many processors.
#if defined(__clang__)
#define SAFEFREEZE_SCALAR_LOOP _Pragma("clang loop vectorize(disable)")
#define SAFEFREEZE_SCALAR
#else
#define SAFEFREEZE_SCALAR_LOOP
#define SAFEFREEZE_SCALAR __attribute__((optimize("no-tree-vectorize", "unroll-loops")))
#endif

template <typename T>
SAFEFREEZE_SCALAR void pick_by_index(const T* row, const T* later, const int32_t* cols, int64_t n, T* __restrict out) {
  int64_t i = 0;
  SAFEFREEZE_SCALAR_LOOP
  for (; i + 2 <= n; i += 2) {
    prefetch(later + cols[i]);
    out[i] = row[cols[i]];
    out[i + 1] = row[cols[i + 1]];
  }
  if (i < n) out[i] = row[cols[i]];
}

template <typename T>
SAFEFREEZE_SCALAR void put_by_index(const T* __restrict values, const int32_t* cols, int64_t n, T* row) {
  SAFEFREEZE_SCALAR_LOOP
  for (int64_t i = 0; i < n; ++i) row[cols[i]] = values[i];
}

template <typename T>
void pick(const T* data, Place place, int64_t n, T* __restrict out) {
  for (int64_t done = 0, row = 0; done < n; done += place.picks, ++row) {
    const T *there = data + place.row_start(row), *later = data + place.row_to_fetch(row);
    if (picks_by_bits && place.col_bits) {
      pick_by_bits(there, place, out + done);
    } else {
      pick_by_index(there, later, place.cols, place.picks, out + done);
    }
  }
}

// Put values to their places; elements whose `frozen` flag is set keep their bytes (no flags: all are written).
template <typename T>
void put(const T* __restrict values, int64_t n, T* __restrict data, Place place, const uint8_t* frozen) {
  if (!place.cols) {
    T* here = data + place.start;
    if (!frozen) {
      memcpy(here, values, static_cast<size_t>(n) * sizeof(T));
    } else if (place.shared) {
      for (int64_t i = 0; i < n; ++i) {
        if (!frozen[i]) here[i] = values[i];
      }
    } else {
      for (int64_t i = 0; i < n; ++i) here[i] = frozen[i] ? here[i] : values[i];
    }
    return;
  }
  for (int64_t done = 0, row = 0; done < n; done += place.picks, ++row) {
    T* here = data + place.row_start(row);
    if (frozen) {
      for (int64_t i = 0; i < place.picks; ++i) {
        if (!frozen[done + i]) here[place.cols[i]] = values[done + i];
      }
    } else if (picks_by_bits && place.col_bits) {
      put_by_bits(values + done, place, here);
    } else {
      put_by_index(values + done, place.cols, place.picks, here);
    }
  }
}

// ------------------------------------------------------------------------------------- storage <-> float32 stage

void load_f16(const uint16_t* data, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(stored));
  }
#endif
  for (; i < n; ++i) out[i] = from_f16(data[i]);
}

void store_f16(const float* values, int64_t n, uint16_t* data) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i stored = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data + i), stored);
  }
#endif
  for (; i < n; ++i) data[i] = to_f16(values[i]);
}

using Stage = float[block + slack];

// `others`: flags of elements that another thread may be writing; 0 is read for them. May be null.
template <typename T>
void copy_or_pick(const T* data, Place place, int64_t n, T* __restrict out, const uint8_t* others = nullptr) {
  if (others) {
    const int64_t width = place.cols ? place.picks : n;
    for (int64_t done = 0, row = 0; done < n; done += width, ++row) {
      const T* here = data + (place.cols ? place.row_start(row) : place.start);
      for (int64_t i = 0; i < width; ++i) {
        out[done + i] = others[done + i] ? T(0) : here[place.cols ? place.cols[i] : i];
      }
    }
  } else if (place.cols) {
    pick(data, place, n, out);
  } else {
    memcpy(out, data + place.start, static_cast<size_t>(n) * sizeof(T));
  }
}

void load(DType dtype, int64_t address, Place place, int64_t n, float* __restrict out,
          const uint8_t* others = nullptr) {
  if (dtype == DType::f32) {
    // Bits, not floats: the same code picks every storage type.
    copy_or_pick(at<const uint32_t>(address), place, n, reinterpret_cast<uint32_t*>(out), others);
    return;
  }
  const uint16_t* data = at<const uint16_t>(address);
  uint16_t picked[block + slack];
  const bool staged = place.cols || others;
  if (staged) copy_or_pick(data, place, n, picked, others);
  const uint16_t* stored = staged ? picked : data + place.start;
  if (dtype == DType::bf16) {
    for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(stored[i]);
  } else {
    load_f16(stored, n, out);
  }
}

// `noise`: for stochastic rounding; null: to nearest.
void store(DType dtype, const float* values, int64_t n, int64_t address, Place place, const uint8_t* frozen,
           const uint16_t* noise = nullptr) {
  if (dtype == DType::f32) {
    put(reinterpret_cast<const uint32_t*>(values), n, at<uint32_t>(address), place, frozen);
    return;
  }
  uint16_t rounded[block + slack];
  if (dtype == DType::bf16) {
    for (int64_t i = 0; i < n; ++i) rounded[i] = to_bf16(values[i]);
  } else if (noise) {
    for (int64_t i = 0; i < n; ++i) rounded[i] = to_f16(values[i], noise[i]);
  } else {
    store_f16(values, n, rounded);
  }
  put(rounded, n, at<uint16_t>(address), place, frozen);
}

// A float32 view of a block: in place where that is possible, staged otherwise.
struct View {
  float* values;
  bool staged;
};

View view(DType dtype, int64_t address, Place place, int64_t n, float* stage, bool in_place = true) {
  if (in_place && dtype == DType::f32 && !place.cols) {
    return {at<float>(address) + place.start, false};
  }
  load(dtype, address, place, n, stage);
  return {stage, true};
}

// ------------------------------------------------------------------------------------------------ element bits

// One flag per element of the block, from one bit per element of the tensor.
void expand_bits(int64_t frozen_bits, Place place, int64_t n, uint8_t* __restrict flags) {
  const uint8_t* bits = at<const uint8_t>(frozen_bits);
  if (place.cols) {
    for (int64_t done = 0, row = 0; done < n; done += place.picks, ++row) {
      for (int64_t i = 0; i < place.picks; ++i) {
        const int64_t element = place.row_start(row) + place.cols[i];
        flags[done + i] = (bits[element >> 3] >> (element & 7)) & 1;
      }
    }
    return;
  }
  for (int64_t i = 0; i < n; i += 32) {
    uint64_t word;  // unaligned: up to 7 bits of the first byte belong to the elements before
    memcpy(&word, bits + ((place.start + i) >> 3), 8);
    const uint32_t next = static_cast<uint32_t>(word >> ((place.start + i) & 7));
    for (uint32_t j = 0; j < 32; ++j) flags[i + j] = static_cast<uint8_t>((next >> j) & 1u);
  }
}

// One block of a run: `n` elements, `done` of the run's came before.
struct Block {
  const RunPart& part;
  int64_t set;   // of scalars
  Place place;   // in the tensor
  Place packed;  // in its packed twin
  int64_t n;
  int64_t done;
};

int64_t count_bits(const uint16_t* bits, int64_t from, int64_t to) {
  int64_t count = 0;
  for (int64_t col = from; col < to; col += 16) count += __builtin_popcount(bits[col / 16]);
  return count;
}

// Walk a chunk block by block. A block is a stretch of a contiguous run; or a window of `block` columns of a row; or,
// where rows pick few columns and their packed twins follow each other, several rows.
template <typename Step>
void walk(const Runs& work, int64_t chunk_index, Step step) {
  const Chunk& chunk = work.chunks[chunk_index];
  const RunPart& part = work.parts[chunk.part];
  const int32_t* cols = at<const int32_t>(part.cols);
  const bool same = cols && part.packed_cols == part.cols;  // the packed twin is as the tensor is
  const int32_t* packed_cols = same ? nullptr : at<const int32_t>(part.packed_cols);
  const bool shared = part.shared != 0;
  // put_by_bits writes back what lies between picks
  const uint16_t* col_bits = picks_by_bits && !shared ? at<const uint16_t>(part.col_bits) : nullptr;
  for (int64_t r = chunk.begin; r < chunk.end;) {
    const Run& run = work.runs[r];
    int64_t rows = 1;
    if (cols && !packed_cols && 2 * run.count <= block) {
      while (r + rows < chunk.end && (rows + 1) * run.count <= block &&
             work.runs[r + rows].set == run.set &&
             (same || work.runs[r + rows].packed == run.packed + rows * run.count)) {
        ++rows;
      }
    }
    int64_t from = 0;
    for (int64_t done = 0; done < run.count;) {
      int64_t n = run.count - done < block ? run.count - done : block;
      Place place{run.start + (cols ? 0 : done)};
      if (cols) {
        place.cols = cols + done;
        place.rows = &run;
        place.n_rows = chunk.end - r;
        if (col_bits) {
          const int64_t last = cols[run.count - 1] + 1;
          place.col_bits = col_bits;
          place.from = from;
          place.to = rows > 1 || last - from < block ? last : from + block;
          if (rows == 1) n = count_bits(col_bits, from, place.to);
          from = place.to;
        }
        place.picks = n;
      }
      place.shared = shared;
      Place packed = place;
      if (!same) packed = Place{run.packed + (packed_cols ? 0 : done)};
      packed.shared = shared;
      if (packed_cols) {
        packed.cols = packed_cols + done;
        packed.picks = n;
      }
      if (n) step(Block{part, run.set, place, packed, n * rows, done});
      done += n;
    }
    r += rows;
  }
}

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

// Chosen by arithmetic, not by a branch: compilers turn `if (...) store` into masked stores, which run three times
// slower than whole ones once the data comes from memory (measured on Zen 5).
inline float select(uint8_t flag, float old_value, float new_value) {
  FloatBits old_bits, new_bits;
  old_bits.value = old_value;
  new_bits.value = new_value;
  const uint32_t keep_old = 0u - flag;
  new_bits.bits = (old_bits.bits & keep_old) | (new_bits.bits & ~keep_old);
  return new_bits.value;
}
inline uint16_t select(uint8_t flag, uint16_t old_value, uint16_t new_value) {
  const uint32_t keep_old = 0u - flag;
  return static_cast<uint16_t>((old_value & keep_old) | (new_value & ~keep_old));
}

// `masked`: an element whose flag is set keeps its bytes, state included; what its lane computes is dropped.
template <typename P, typename S, Rounding rounding, bool l2, bool amsgrad, bool masked>
void adamw_block(void* params, const void* grads, void* exp_avgs, void* exp_avg_sqs, void* max_exp_avg_sqs,
                 uint16_t* __restrict extras, const uint8_t* __restrict frozen, int64_t n, Scalars s) {
  P* __restrict p = static_cast<P*>(params);
  const P* __restrict g = static_cast<const P*>(grads);
  S* __restrict m = static_cast<S*>(exp_avgs);
  S* __restrict v = static_cast<S*>(exp_avg_sqs);
  S* __restrict x = static_cast<S*>(max_exp_avg_sqs);
  for (int64_t i = 0; i < n; ++i) {
    uint16_t extra = rounding == Rounding::nearest ? uint16_t(0) : extras[i];
    float pi = param_of<rounding>(p[i], extra), mi = value_of(m[i]), vi = value_of(v[i]);
    float xi = amsgrad ? value_of(x[i]) : 0.0f;
    adamw<l2, amsgrad>(pi, value_of(g[i]), mi, vi, xi, s);
    P p_new;
    S m_new, v_new, x_new;
    keep_param<rounding>(pi, p_new, extra);
    keep(mi, m_new);
    keep(vi, v_new);
    p[i] = masked ? select(frozen[i], p[i], p_new) : p_new;
    m[i] = masked ? select(frozen[i], m[i], m_new) : m_new;
    v[i] = masked ? select(frozen[i], v[i], v_new) : v_new;
    if (amsgrad) {
      keep(xi, x_new);
      x[i] = masked ? select(frozen[i], x[i], x_new) : x_new;
    }
    if (rounding == Rounding::remainder) extras[i] = masked ? select(frozen[i], extras[i], extra) : extra;
  }
}

using AdamWBlock = void (*)(void*, const void*, void*, void*, void*, uint16_t*, const uint8_t*, int64_t, Scalars);

template <typename P, typename S, Rounding rounding>
AdamWBlock choose_flags(bool l2, bool amsgrad, bool masked) {
  static constexpr AdamWBlock blocks[2][2][2] = {
      {{adamw_block<P, S, rounding, false, false, false>, adamw_block<P, S, rounding, false, false, true>},
       {adamw_block<P, S, rounding, false, true, false>, adamw_block<P, S, rounding, false, true, true>}},
      {{adamw_block<P, S, rounding, true, false, false>, adamw_block<P, S, rounding, true, false, true>},
       {adamw_block<P, S, rounding, true, true, false>, adamw_block<P, S, rounding, true, true, true>}},
  };
  return blocks[l2][amsgrad][masked];
}

template <typename S>
AdamWBlock choose_block(bool bf16, Rounding rounding, bool l2, bool amsgrad, bool masked) {
  const auto choose = !bf16                              ? choose_flags<float, S, Rounding::nearest>
                      : rounding == Rounding::remainder  ? choose_flags<uint16_t, S, Rounding::remainder>
                      : rounding == Rounding::stochastic ? choose_flags<uint16_t, S, Rounding::stochastic>
                                                         : choose_flags<uint16_t, S, Rounding::nearest>;
  return choose(l2, amsgrad, masked);
}

// A block's operand as float32 or bfloat16: where it lies, if its elements lie together there, else its stage.
struct Operand {
  void* data;
  bool bf16, staged;
};

Operand operand(DType dtype, int64_t address, Place place, int64_t n, float* stage, const uint8_t* others) {
  const bool in_place = !others && !place.cols;
  if (dtype == DType::bf16) {
    uint16_t* data = at<uint16_t>(address);
    if (in_place) return {data + place.start, true, false};
    uint16_t* staged = reinterpret_cast<uint16_t*>(stage);
    copy_or_pick(data, place, n, staged, others);
    return {staged, true, true};
  }
  if (in_place && dtype == DType::f32) return {at<float>(address) + place.start, false, false};
  load(dtype, address, place, n, stage, others);
  return {stage, false, true};
}

void put_back(const Operand& operand, DType dtype, int64_t address, Place place, int64_t n, const uint8_t* frozen,
              const uint16_t* noise = nullptr) {
  if (!operand.staged) return;
  if (operand.bf16) {
    put(static_cast<const uint16_t*>(operand.data), n, at<uint16_t>(address), place, frozen);
  } else {
    store(dtype, static_cast<const float*>(operand.data), n, address, place, frozen, noise);
  }
}

// The noise of a block's elements.
void make_noise(uint64_t seed, uint32_t step, uint32_t number, Place place, int64_t n, uint16_t* noise) {
  if (place.cols) {
    for (int64_t done = 0, row = 0; done < n; done += place.picks, ++row) {
      uint64_t group = ~uint64_t(0);
      Words eight{};
      for (int64_t i = 0; i < place.picks; ++i) {
        const uint64_t element = static_cast<uint64_t>(place.row_start(row) + place.cols[i]);
        if (element / 8 != group) eight = noise_of_eight(seed, step, number, group = element / 8);
        noise[done + i] = noise_of(eight, element);
      }
    }
    return;
  }
  const uint64_t first = static_cast<uint64_t>(place.start), end = first + static_cast<uint64_t>(n);
  for (uint64_t group = first / 8; group * 8 < end; ++group) {
    const Words eight = noise_of_eight(seed, step, number, group);
    for (uint64_t element = group * 8; element < group * 8 + 8; ++element) {
      if (element >= first && element < end) noise[element - first] = noise_of(eight, element);
    }
  }
}

void adamw_chunk(const AdamWLaunch& launch, int64_t chunk) {
  alignas(64) Stage stage[6];
  alignas(64) uint8_t flag_stage[block];
  walk(launch.work, chunk, [&](const Block& b) {
    const AdamWTensor& tensor = launch.tensors[b.part.tensor];
    const int64_t grad = launch.grads[b.part.tensor].data;
    if (grad == 0) return;
    const DType dtype = static_cast<DType>(launch.param_dtype[b.part.tensor]);
    const DType state = static_cast<DType>(launch.state_dtype[b.part.tensor]);
    const Scalars& scalars = launch.scalars[launch.scalar_set[b.set]];
    const uint8_t* frozen = nullptr;
    if (b.part.frozen_bits) {
      expand_bits(b.part.frozen_bits, b.place, b.n, flag_stage);
      frozen = flag_stage;
    }
    const uint8_t* const others = frozen && b.place.shared ? frozen : nullptr;
    const Operand p = operand(dtype, tensor.param, b.place, b.n, stage[0], others);
    const Operand g = operand(dtype, grad, tensor.packed_grad ? b.packed : b.place, b.n, stage[1], others);
    const Operand m = operand(state, tensor.exp_avg, b.packed, b.n, stage[2], others);
    const Operand v = operand(state, tensor.exp_avg_sq, b.packed, b.n, stage[3], others);
    const Operand x = launch.amsgrad ? operand(state, tensor.max_exp_avg_sq, b.packed, b.n, stage[4], others)
                                     : Operand{nullptr, false, false};
    Operand extra{nullptr, true, false};
    Rounding rounding = Rounding::nearest;
    if (tensor.remainder) {
      rounding = Rounding::remainder;
      extra = operand(DType::bf16, tensor.remainder, b.packed, b.n, stage[5], others);
    } else if (launch.stochastic && dtype != DType::f32) {
      rounding = Rounding::stochastic;
      extra.data = stage[5];
      make_noise(launch.seed, scalars.step, static_cast<uint32_t>(tensor.number), b.place, b.n,
                 static_cast<uint16_t*>(extra.data));
    }
    const auto choose = m.bf16 ? choose_block<uint16_t> : choose_block<float>;
    uint16_t* const extras = static_cast<uint16_t*>(extra.data);
    choose(p.bf16, rounding, launch.l2, launch.amsgrad, frozen != nullptr)(p.data, g.data, m.data, v.data, x.data,
                                                                           extras, frozen, b.n, scalars);
    put_back(p, dtype, tensor.param, b.place, b.n, frozen, rounding == Rounding::stochastic ? extras : nullptr);
    put_back(m, state, tensor.exp_avg, b.packed, b.n, frozen);
    put_back(v, state, tensor.exp_avg_sq, b.packed, b.n, frozen);
    put_back(x, state, tensor.max_exp_avg_sq, b.packed, b.n, frozen);
    put_back(extra, DType::bf16, tensor.remainder, b.packed, b.n, frozen);
  });
}

// Flags of what the list does not visit, for `put`; null if it visits the whole block.
const uint8_t* kept_flags(const Runs& work, const Block& b, uint8_t* flags) {
  if (!b.part.frozen_bits) return nullptr;
  expand_bits(b.part.frozen_bits, b.place, b.n, flags);
  if (work.frozen) {
    for (int64_t i = 0; i < b.n; ++i) flags[i] ^= 1;
  }
  return flags;
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

void norm_chunk(const NormLaunch& launch, int64_t chunk) {
  double running[lanes] = {};
  alignas(64) Stage stage;
  alignas(64) uint8_t flags[block];
  walk(launch.work, chunk, [&](const Block& b) {
    const int64_t address = launch.tensors[b.part.tensor].data;
    if (address == 0) return;
    const DType dtype = static_cast<DType>(launch.dtype[b.part.tensor]);
    const uint8_t* kept = kept_flags(launch.work, b, flags);
    const View g = view(dtype, address, b.place, b.n, stage, !kept);
    if (kept) {
      for (int64_t i = 0; i < b.n; ++i) g.values[i] = kept[i] ? 0.0f : g.values[i];
    }
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
  alignas(64) Stage stage;
  alignas(64) uint8_t flags[block];
  walk(launch.work, chunk, [&](const Block& b) {
    const int64_t address = launch.tensors[b.part.tensor].data;
    if (address == 0) return;
    const DType dtype = static_cast<DType>(launch.dtype[b.part.tensor]);
    const uint8_t* kept = kept_flags(launch.work, b, flags);
    const View g = view(dtype, address, b.place, b.n, stage, !kept);
    for (int64_t i = 0; i < b.n; ++i) g.values[i] = g.values[i] * launch.factor;
    if (g.staged) store(dtype, g.values, b.n, address, b.place, kept);
  });
}

// Zeros written past the caches: nobody reads frozen gradients, and a line that is to be overwritten need not be
// fetched first. Short stretches are not worth it.
void write_zeros(char* data, size_t size) {
#if defined(__SSE2__)
  constexpr size_t line = 64;
  const size_t head = (line - reinterpret_cast<uintptr_t>(data) % line) % line;
  if (size >= head + 8 * line) {
    memset(data, 0, head);
    char* const end = data + size - (size - head) % line;
    for (char* at = data + head; at < end; at += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(at), _mm_setzero_si128());
    size -= static_cast<size_t>(end - data);
    data = end;
  }
#endif
  memset(data, 0, size);
}

template <typename T>
void zero_block(T* data, const Block& b, const uint8_t* kept) {
  static const T zeros[block + slack] = {};
  if (kept || b.place.cols) {
    put(zeros, b.n, data, b.place, kept);
  } else {
    write_zeros(reinterpret_cast<char*>(data + b.place.start), static_cast<size_t>(b.n) * sizeof(T));
  }
}

void zero_chunk(const ZeroLaunch& launch, int64_t chunk) {
  alignas(64) uint8_t flags[block];
  walk(launch.work, chunk, [&](const Block& b) {
    const int64_t address = launch.tensors[b.part.tensor].data;
    if (address == 0) return;
    const uint8_t* kept = kept_flags(launch.work, b, flags);
    if (width(static_cast<DType>(launch.dtype[b.part.tensor])) == 4) {
      zero_block(at<uint32_t>(address), b, kept);
    } else {
      zero_block(at<uint16_t>(address), b, kept);
    }
  });
#if defined(__SSE2__)
  _mm_sfence();  // streamed stores are not ordered by what ends the parallel region
#endif
}

// A live list's packed twin keeps a place, holding zero, for a frozen single element; a frozen list's twin has no
// gaps, so `skipped` counts the elements of the run not visited so far.
template <typename T>
void gather_block(const T* data, T* twin, const Block& b, const uint8_t* kept, bool frozen, int64_t& skipped) {
  T stage[block + slack];
  const T* values = data + b.place.start;
  if (b.place.cols) {
    pick(data, b.place, b.n, stage);
    values = stage;
  }
  if (kept && frozen) {
    for (int64_t i = 0; i < b.n; ++i) {
      if (kept[i]) {
        ++skipped;
      } else {
        twin[b.packed.start + i - skipped] = values[i];
      }
    }
    return;
  }
  if (kept) {
    for (int64_t i = 0; i < b.n; ++i) stage[i] = kept[i] ? T(0) : values[i];
    values = stage;
  }
  put(values, b.n, twin, b.packed, nullptr);
}

template <typename T>
void scatter_block(T* data, const T* twin, const Block& b, const uint8_t* kept, bool frozen, int64_t& skipped) {
  T stage[block + slack];
  const T* values = twin + b.packed.start;
  if (kept && frozen) {
    for (int64_t i = 0; i < b.n; ++i) {
      skipped += kept[i];
      stage[i] = kept[i] ? T(0) : twin[b.packed.start + i - skipped];
    }
    values = stage;
  } else if (b.packed.cols) {
    pick(twin, b.packed, b.n, stage);
    values = stage;
  } else if (b.place.col_bits) {  // put_by_bits reads whole vectors, past the last value
    memcpy(stage, values, static_cast<size_t>(b.n) * sizeof(T));
    values = stage;
  }
  put(values, b.n, data, b.place, kept);
}

void copy_chunk(const CopyLaunch& launch, int64_t chunk) {
  alignas(64) uint8_t flags[block];
  int64_t skipped = 0;
  const bool frozen = launch.work.frozen;
  walk(launch.work, chunk, [&](const Block& b) {
    const PackedTensor& tensor = launch.tensors[b.part.tensor];
    if (tensor.data == 0) return;
    const uint8_t* kept = kept_flags(launch.work, b, flags);
    if (b.done == 0) skipped = 0;
    if (width(static_cast<DType>(launch.dtype[b.part.tensor])) == 4) {
      uint32_t *data = at<uint32_t>(tensor.data), *twin = at<uint32_t>(tensor.packed);
      launch.gather ? gather_block(data, twin, b, kept, frozen, skipped)
                    : scatter_block(data, twin, b, kept, frozen, skipped);
    } else {
      uint16_t *data = at<uint16_t>(tensor.data), *twin = at<uint16_t>(tensor.packed);
      launch.gather ? gather_block(data, twin, b, kept, frozen, skipped)
                    : scatter_block(data, twin, b, kept, frozen, skipped);
    }
  });
}

}  // namespace

const CpuKernels SAFEFREEZE_JOIN(cpu_kernels_, SAFEFREEZE_ISA) = {
    SAFEFREEZE_TEXT(SAFEFREEZE_ISA),           adamw_chunk, norm_chunk, scale_chunk, zero_chunk, copy_chunk,
    SAFEFREEZE_JOIN(compare_, SAFEFREEZE_ISA),
};

}  // namespace safefreeze
