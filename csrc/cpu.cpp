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

// What moves is moved as bits.
inline uint32_t* bits_of(float* data) { return reinterpret_cast<uint32_t*>(data); }
inline const uint32_t* bits_of(const float* data) { return reinterpret_cast<const uint32_t*>(data); }
inline uint16_t* bits_of(uint16_t* data) { return data; }
inline const uint16_t* bits_of(const uint16_t* data) { return data; }

int64_t width(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// ------------------------------------------------------------------------------------------------ picking elements

// Bits of `span` neighbours, of which bit `first` is the first one's. Picked are those whose bit differs from `flip`.
struct Bits {
  const uint8_t* bytes = nullptr;  // readable 8 bytes past their end; null: there are none
  int64_t first = 0, span = 0;
  uint32_t flip = 0;

  // Which of 64 neighbours from number i on are picked; none of what is beyond the span may be asked for.
  uint64_t whole(int64_t i) const {
    const uint8_t* const from = bytes + ((first + i) >> 3);
    const int shift = static_cast<int>(first & 7);
    uint64_t word;
    memcpy(&word, from, 8);
    if (shift) word = word >> shift | static_cast<uint64_t>(from[8]) << (64 - shift);
    return flip ? ~word : word;
  }
  // The same of sixteen, in the low bits.
  uint32_t sixteen(int64_t i) const {
    uint32_t word;
    memcpy(&word, bytes + ((first + i) >> 3), 4);
    return (word >> (first & 7) ^ flip) & 0xffffu;
  }
  // Those of the last few, fewer than 64.
  uint64_t rest(int64_t i) const { return i < span ? whole(i) & ((uint64_t(1) << (span - i)) - 1u) : 0; }

  // Lets the span grow to as many of `most` neighbours as there is room for. How many of them are picked.
  int64_t grow(int64_t most, int64_t room) {
    int64_t picks = 0;
    for (; span + 64 <= most; span += 64) {
      const int more = __builtin_popcountll(whole(span));
      if (picks + more > room) return picks;
      picks += more;
    }
    const int64_t before = span;
    span = most;
    const int more = __builtin_popcountll(rest(before));
    if (picks + more <= room) return picks + more;
    span = before;
    return picks;
  }

  // Calls `take(i)` for each neighbour that is picked.
  template <typename Take>
  void each(Take take) const {
    for (int64_t i = 0; i < span; i += 64) {
      uint64_t picked = i + 64 <= span ? whole(i) : rest(i);
      for (; picked; picked &= picked - 1u) take(i + __builtin_ctzll(picked));
    }
  }
};

// Where a block lies: `n` elements from element `start`, or of these neighbours those that `bits` pick; or, with
// `cols`, `picks` columns of the row that begins there, or of each of the rows that begin where `rows` say. The same
// picks as bits cover a window of a row, where columns are not too sparse for that; `bits.first` is then its first
// column.
struct Place {
  int64_t start;
  Bits bits{};
  const int32_t* cols = nullptr;
  const Run* rows = nullptr;
  int64_t picks = 0;
  int64_t followed = 0;  // from element `start` on, how many have an element of the run `ahead` of them
  int64_t n_rows = 0;    // rows from `rows` on in this chunk: more than the block has, if others follow
  bool shared = false;   // other threads may be writing to the elements between: touch none but one's own

  bool together() const { return !cols && !bits.bytes; }
  int64_t row_start(int64_t row) const { return rows ? rows[row].start : start; }
  // The row to fetch while `row` is picked: two ahead, since hardware prefetchers lose their way among picks (Zen 5).
  int64_t row_to_fetch(int64_t row) const { return row_start(row + 2 < n_rows ? row + 2 : row); }
};

// How far ahead memory is fetched within a run: hardware prefetchers stop at the end of every page.
constexpr int64_t ahead = 256;

template <typename T>
inline void prefetch(const T* data) {
#if defined(__GNUC__)
  __builtin_prefetch(data);
#else
  (void)data;
#endif
}

constexpr int64_t slack = 16;  // elements: whole vectors are written, and read, past the last pick

#if defined(__AVX512BW__) && defined(__AVX512VL__)
// Sixteen neighbours at a time. Whole vectors are loaded, blended and stored: masked ones run three times slower once
// the data comes from memory (measured on Zen 5). Only the last, short vector of a row is masked, to stay inside the
// row.
inline __m512i load_16(const uint32_t* data) { return _mm512_loadu_si512(data); }
inline __m512i load_16(const uint16_t* data) {
  return _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
}
inline __m512i load_16(const uint8_t* data) {
  return _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
}
inline __m512i load_some(const uint32_t* data, __mmask16 some) { return _mm512_maskz_loadu_epi32(some, data); }
inline __m512i load_some(const uint16_t* data, __mmask16 some) {
  return _mm512_maskz_cvtepu16_epi32(some, _mm256_maskz_loadu_epi16(some, data));
}
inline __m512i load_some(const uint8_t* data, __mmask16 some) {
  return _mm512_maskz_cvtepu8_epi32(some, _mm_maskz_loadu_epi8(some, data));
}
inline void store_16(uint32_t* data, __m512i values) { _mm512_storeu_si512(data, values); }
inline void store_16(uint16_t* data, __m512i values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), _mm512_maskz_cvtepi32_epi16(0xffff, values));
}
inline void store_16(uint8_t* data, __m512i values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(data), _mm512_maskz_cvtepi32_epi8(0xffff, values));
}
inline void store_some(uint32_t* data, __mmask16 some, __m512i values) { _mm512_mask_storeu_epi32(data, some, values); }
inline void store_some(uint16_t* data, __mmask16 some, __m512i values) {
  _mm256_mask_storeu_epi16(data, some, _mm512_maskz_cvtepi32_epi16(0xffff, values));
}
constexpr bool picks_columns_by_bits = true;
#define SAFEFREEZE_SIXTEEN  // the step takes sixteen at a time, in registers, and leaves alone those it is told to

template <typename T>
struct Pick {
  const T* data;
  T* out;
  Pick(const T* from, T* to) : data(from), out(to) {}
};

template <typename T>
inline void pick_16(const T* data, uint64_t picked, T* out) {
  store_16(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(picked), load_16(data)));
}
template <typename T>
inline void put_16(const T* values, uint64_t picked, T* data) {
  store_16(data, _mm512_mask_expand_epi32(load_16(data), static_cast<__mmask16>(picked), load_16(values)));
}
inline int count_16(uint64_t picked) { return __builtin_popcount(static_cast<uint32_t>(picked & 0xffff)); }

// Picks from each of some arrays at once; `followed`: how many neighbours have others of their run `ahead` of them.
template <typename... T>
void pick_by_bits(const Bits& bits, int64_t followed, Pick<T>... from) {
  int64_t i = 0;
  for (; i + 64 <= bits.span; i += 64) {
    const uint64_t picked = bits.whole(i);
    for (int k = 0; i < followed && k < 64; k += 16) (prefetch(from.data + i + k + ahead), ...);
    if (!picked) continue;
    for (int k = 0; k < 64; k += 16) {
      const int count = count_16(picked >> k);
      ((pick_16(from.data + i + k, picked >> k, from.out), from.out += count), ...);
    }
  }
  uint64_t picked = bits.rest(i);
  for (; i + 16 <= bits.span; i += 16, picked >>= 16) {
    const int count = count_16(picked);
    ((pick_16(from.data + i, picked, from.out), from.out += count), ...);
  }
  const __mmask16 some = static_cast<__mmask16>(picked);
  if (some) (store_16(from.out, _mm512_maskz_compress_epi32(some, load_some(from.data + i, some))), ...);
}

template <typename T>
void pick_by_bits(const T* data, const Bits& bits, T* out, int64_t followed = 0) {
  pick_by_bits(bits, followed, Pick<T>{data, out});
}

template <typename T>
void put_by_bits(const T* values, const Bits& bits, T* data) {
  int64_t i = 0;
  for (; i + 64 <= bits.span; i += 64) {
    const uint64_t picked = bits.whole(i);
    if (!picked) continue;
    for (int k = 0; k < 64; k += 16) {
      put_16(values, picked >> k, data + i + k);
      values += count_16(picked >> k);
    }
  }
  uint64_t picked = bits.rest(i);
  for (; i + 16 <= bits.span; i += 16, picked >>= 16) {
    put_16(values, picked, data + i);
    values += count_16(picked);
  }
  const __mmask16 some = static_cast<__mmask16>(picked);
  if (some) store_some(data + i, some, _mm512_maskz_expand_epi32(some, load_16(values)));
}
#else
constexpr bool picks_columns_by_bits = false;

#if defined(__AVX2__)
// Eight neighbours at a time, in whole vectors too. Of every eight bits: which neighbours are picked, one after the
// other; and for each neighbour how many are picked before it.
struct Lanes {
  uint8_t picked[256][8], before[256][8];
  constexpr Lanes() : picked(), before() {
    for (int bits = 0; bits < 256; ++bits) {
      int count = 0;
      for (int lane = 0; lane < 8; ++lane) {
        before[bits][lane] = static_cast<uint8_t>(count);
        if (bits >> lane & 1) picked[bits][count++] = static_cast<uint8_t>(lane);
      }
      for (int rest = count; rest < 8; ++rest) picked[bits][rest] = 0;
    }
  }
};
constexpr Lanes lanes_of{};

inline __m256i load_8(const uint32_t* data) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)); }
inline __m256i load_8(const uint16_t* data) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
}
inline __m256i load_8(const uint8_t* data) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(data)));
}
inline void store_8(uint32_t* data, __m256i values) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), values); }
inline __m128i narrowed(__m256i values) {
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(values, values), 0x08));
}
inline void store_8(uint16_t* data, __m256i values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(data), narrowed(values));
}
inline void store_8(uint8_t* data, __m256i values) {
  const __m128i words = narrowed(values);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(data), _mm_packus_epi16(words, words));
}

// The eight whose bits are in `picked`, moved to the front.
template <typename T>
inline void pick_8(const T* data, uint64_t picked, T* out) {
  store_8(out, _mm256_permutevar8x32_epi32(load_8(data), load_8(lanes_of.picked[picked])));
}

template <typename T>
inline void put_8(const T* values, uint64_t picked, T* data) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(picked)), bit), bit);
  const __m256i moved = _mm256_permutevar8x32_epi32(load_8(values), load_8(lanes_of.before[picked]));
  store_8(data, _mm256_blendv_epi8(load_8(data), moved, chosen));
}
#else
template <typename T>
inline void pick_8(const T* data, uint64_t picked, T* __restrict out) {
  for (int i = 0; i < 8; ++i) {
    *out = data[i];
    out += picked >> i & 1u;
  }
}

template <typename T>
inline void put_8(const T* __restrict values, uint64_t picked, T* data) {
  for (int i = 0; i < 8; ++i) {
    const uint64_t chosen = picked >> i & 1u;
    data[i] = chosen ? *values : data[i];
    values += chosen;
  }
}
#endif

inline int count_8(uint64_t picked) { return __builtin_popcount(static_cast<uint32_t>(picked & 0xff)); }

template <typename T>
void pick_by_bits(const T* data, const Bits& bits, T* out, int64_t followed = 0) {
  int64_t i = 0;
  for (; i + 64 <= bits.span; i += 64) {
    for (int k = 0; i < followed && k < 64; k += 16) prefetch(data + i + k + ahead);
    const uint64_t picked = bits.whole(i);
    if (!picked) continue;
    for (int k = 0; k < 64; k += 8) {
      pick_8(data + i + k, picked >> k & 0xff, out);
      out += count_8(picked >> k);
    }
  }
  for (uint64_t picked = bits.rest(i); picked; picked &= picked - 1u) *out++ = data[i + __builtin_ctzll(picked)];
}

template <typename T>
void put_by_bits(const T* values, const Bits& bits, T* data) {
  int64_t i = 0;
  for (; i + 64 <= bits.span; i += 64) {
    const uint64_t picked = bits.whole(i);
    if (!picked) continue;
    for (int k = 0; k < 64; k += 8) {
      put_8(values, picked >> k & 0xff, data + i + k);
      values += count_8(picked >> k);
    }
  }
  for (uint64_t picked = bits.rest(i); picked; picked &= picked - 1u) data[i + __builtin_ctzll(picked)] = *values++;
}
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
void pick(const T* data, const Place& place, int64_t n, T* __restrict out) {
  if (!place.cols) {
    const T* here = data + place.start;
    if (!place.shared) return pick_by_bits(here, place.bits, out, place.followed);
    return place.bits.each([&](int64_t i) { *out++ = here[i]; });
  }
  for (int64_t done = 0, row = 0; done < n; done += place.picks, ++row) {
    const T *there = data + place.row_start(row), *later = data + place.row_to_fetch(row);
    if (place.bits.bytes) {
      pick_by_bits(there + place.bits.first, place.bits, out + done);
    } else {
      pick_by_index(there, later, place.cols, place.picks, out + done);
    }
  }
}

// Puts values to their places. `values` are readable as far as slack goes, unless the elements lie together.
template <typename T>
void put(const T* __restrict values, int64_t n, T* __restrict data, const Place& place) {
  if (place.together()) {
    memcpy(data + place.start, values, static_cast<size_t>(n) * sizeof(T));
    return;
  }
  if (!place.cols) {
    T* here = data + place.start;
    if (!place.shared) return put_by_bits(values, place.bits, here);
    return place.bits.each([&](int64_t i) { here[i] = *values++; });
  }
  for (int64_t done = 0, row = 0; done < n; done += place.picks, ++row) {
    T* here = data + place.row_start(row);
    if (place.bits.bytes) {
      put_by_bits(values + done, place.bits, here + place.bits.first);
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

template <typename T>
void copy_or_pick(const T* data, const Place& place, int64_t n, T* __restrict out) {
  if (place.together()) {
    memcpy(out, data + place.start, static_cast<size_t>(n) * sizeof(T));
  } else {
    pick(data, place, n, out);
  }
}

void load(DType dtype, int64_t address, const Place& place, int64_t n, float* __restrict out) {
  if (dtype == DType::f32) {
    // Bits, not floats: the same code picks every storage type.
    copy_or_pick(at<const uint32_t>(address), place, n, reinterpret_cast<uint32_t*>(out));
    return;
  }
  const uint16_t* data = at<const uint16_t>(address);
  uint16_t picked[block + slack];
  if (!place.together()) pick(data, place, n, picked);
  const uint16_t* stored = place.together() ? data + place.start : picked;
  if (dtype == DType::bf16) {
    for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(stored[i]);
  } else {
    load_f16(stored, n, out);
  }
}

// `noise`: for stochastic rounding; null: to nearest.
void store(DType dtype, const float* values, int64_t n, int64_t address, const Place& place,
           const uint16_t* noise = nullptr) {
  if (dtype == DType::f32) {
    put(reinterpret_cast<const uint32_t*>(values), n, at<uint32_t>(address), place);
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
  put(rounded, n, at<uint16_t>(address), place);
}

// A float32 view of a block: in place where that is possible, staged otherwise.
struct View {
  float* values;
  bool staged;
};

View view(DType dtype, int64_t address, const Place& place, int64_t n, float* stage) {
  if (dtype == DType::f32 && place.together()) return {at<float>(address) + place.start, false};
  load(dtype, address, place, n, stage);
  return {stage, true};
}

// ------------------------------------------------------------------------------------------------- block by block

// One block of a run: `n` elements.
struct Block {
  const RunPart& part;
  int64_t part_index, age;
  Place place;   // in the tensor
  Place packed;  // in its packed twin
  int64_t n;
};

// Of a part with bits a block is as many neighbours as it has room for of those that are picked.
template <typename Step>
void walk_bits(const Runs& work, const Chunk& chunk, Step step) {
  const RunPart& part = work.parts[chunk.part];
  for (int64_t r = chunk.begin; r < chunk.end; ++r) {
    const Run& run = work.runs[r];
    int64_t picked = 0;
    for (int64_t done = 0; done < run.count;) {
      Place place{run.start + done}, packed{run.packed + (part.gapless ? picked : done)};
      place.bits = {at<const uint8_t>(part.frozen_bits), place.start, 0, work.frozen ? 0u : ~0u};
      const int64_t n = place.bits.grow(run.count - done, block), span = place.bits.span;
      if (n == span) place.bits = {};
      place.followed = run.count - done - ahead;
      place.shared = packed.shared = part.shared != 0;
      if (!part.gapless) packed.bits = place.bits;
      if (n) step(Block{part, chunk.part, 0, place, packed, n});
      done += span;
      picked += n;
    }
  }
}

// Walk a chunk block by block. A block is a stretch of a contiguous run; or a window of `block` columns of a row; or,
// where rows pick few columns and their packed twins follow each other, several rows.
template <typename Step>
void walk(const Runs& work, int64_t chunk_index, Step step) {
  const Chunk& chunk = work.chunks[chunk_index];
  const RunPart& part = work.parts[chunk.part];
  if (part.frozen_bits) return walk_bits(work, chunk, step);
  const int32_t* cols = at<const int32_t>(part.cols);
  const bool same = cols && part.packed_cols == part.cols;  // the packed twin is as the tensor is
  const int32_t* packed_cols = same ? nullptr : at<const int32_t>(part.packed_cols);
  const bool shared = part.shared != 0;
  // put_by_bits writes back what lies between picks
  const uint8_t* col_bits = picks_columns_by_bits && !shared ? at<const uint8_t>(part.col_bits) : nullptr;
  for (int64_t r = chunk.begin; r < chunk.end;) {
    const Run& run = work.runs[r];
    int64_t rows = 1;
    if (cols && !packed_cols && 2 * run.count <= block) {
      while (r + rows < chunk.end && (rows + 1) * run.count <= block && work.runs[r + rows].age == run.age &&
             (same || work.runs[r + rows].packed == run.packed + rows * run.count)) {
        ++rows;
      }
    }
    int64_t from = 0;
    for (int64_t done = 0; done < run.count;) {
      int64_t n = run.count - done < block ? run.count - done : block;
      Place place{run.start + (cols ? 0 : done)};
      if (!cols) place.followed = run.count - done - ahead;
      if (cols) {
        place.cols = cols + done;
        place.rows = &run;
        place.n_rows = chunk.end - r;
        if (col_bits) {
          const int64_t last = cols[run.count - 1] + 1;
          place.bits = {col_bits, from, 0, 0};
          n = place.bits.grow(last - from, block);
          from += place.bits.span;
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
      if (n) step(Block{part, chunk.part, run.age, place, packed, n * rows});
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
  float step_size[block + slack], bias2_sqrt[block + slack];
  uint32_t step[block];  // of stochastic rounding
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
  int64_t followed;  // how many have elements of the same run `ahead` of them
};

#if defined(SAFEFREEZE_SIXTEEN)
// Those of sixteen neighbours that are `live`. `whole`: all lie within the block. Whatever is computed of the others is
// dropped.
template <bool whole, Rounding rounding, bool l2, bool amsgrad, bool by_age, typename P, typename S>
SAFEFREEZE_INLINE void adamw_16(P* p, const P* g, S* m, S* v, S* x, uint16_t* extras, const Aged& aged, int64_t i,
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
    struct Own : Scalars {
      Floats step_size, bias2_sqrt;
    } own{s, read_16(aged.step_size + i), read_16(aged.bias2_sqrt + i)};
    adamw_stored<rounding, l2, amsgrad>(p_now, read(g), m_now, v_now, x_now, extra_now, own);
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
    if (i < followed) {
      prefetch(p + i + ahead);
      prefetch(g + i + ahead);
      prefetch(m + i + ahead);
      prefetch(v + i + ahead);
    }
    if (i + 16 <= n) {
      if (live) adamw_16<true, rounding, l2, amsgrad, by_age>(p, g, m, v, x, extras, *e.aged, i, live, s);
    } else if (live &= (1u << (n - i)) - 1u) {
      adamw_16<false, rounding, l2, amsgrad, by_age>(p, g, m, v, x, extras, *e.aged, i, live, s);
    }
  }
#else
  for (int64_t i = 0; i < n; ++i) {
    uint16_t extra = rounding == Rounding::nearest ? uint16_t(0) : extras[i];
    S none{};
    if (by_age) {
      s.step_size = e.aged->step_size[i];
      s.bias2_sqrt = e.aged->bias2_sqrt[i];
    }
    adamw_stored<rounding, l2, amsgrad>(p[i], g[i], m[i], v[i], amsgrad ? x[i] : none, extra, s);
    if (rounding == Rounding::remainder) extras[i] = extra;
  }
#endif
}

using AdamWBlock = void (*)(const Elements&, Scalars);

template <typename P, typename S, Rounding rounding>
AdamWBlock choose_flags(bool l2, bool amsgrad, bool by_age) {
  static constexpr AdamWBlock blocks[2][2][2] = {
      {{adamw_block<P, S, rounding, false, false, false>, adamw_block<P, S, rounding, false, false, true>},
       {adamw_block<P, S, rounding, false, true, false>, adamw_block<P, S, rounding, false, true, true>}},
      {{adamw_block<P, S, rounding, true, false, false>, adamw_block<P, S, rounding, true, false, true>},
       {adamw_block<P, S, rounding, true, true, false>, adamw_block<P, S, rounding, true, true, true>}},
  };
  return blocks[l2][amsgrad][by_age];
}

template <typename S>
AdamWBlock choose_block(bool bf16, Rounding rounding, bool l2, bool amsgrad, bool by_age) {
  const auto choose = !bf16                              ? choose_flags<float, S, Rounding::nearest>
                      : rounding == Rounding::remainder  ? choose_flags<uint16_t, S, Rounding::remainder>
                      : rounding == Rounding::stochastic ? choose_flags<uint16_t, S, Rounding::stochastic>
                                                         : choose_flags<uint16_t, S, Rounding::nearest>;
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
    for (int64_t i = 0; i < n; i += 16) {
      const __m512i age = load_16(ages + i);
      _mm512_storeu_ps(aged.step_size + i, _mm512_permutex2var_ps(step_size_low, age, step_size_high));
      _mm512_storeu_ps(aged.bias2_sqrt + i, _mm512_permutex2var_ps(bias2_sqrt_low, age, bias2_sqrt_high));
    }
    return;
  }
#endif
  (void)n_ages;
  for (int64_t i = 0; i < n; ++i) {
    const Scalars& row = rows[ages[i]];
    aged.step_size[i] = row.step_size;
    aged.bias2_sqrt[i] = row.bias2_sqrt;
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
  const AdamWBlock step =
      (bf16 ? choose_block<uint16_t> : choose_block<float>)(sizeof(P) == 2,
                                                            tensor.remainder ? Rounding::remainder : Rounding::nearest,
                                                            launch.l2, launch.amsgrad, part.ages != 0);
  for (int64_t r = chunk.begin; r < chunk.end; ++r) {
    const Run& run = launch.work.runs[r];
    P* p = at<P>(tensor.param) + run.start;
    const P* g = at<const P>(grad) + run.start;
    Bits bits{at<const uint8_t>(part.frozen_bits), run.start, 0, ~0u};
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
  if (!part.frozen_bits || part.shared || tensor.packed_grad || stochastic || dtype == DType::f16) return false;
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
  walk(launch.work, chunk, [&](const Block& b) {
    const AdamWTensor& tensor = launch.tensors[b.part.tensor];
    const int64_t grad = launch.grads[b.part.tensor].data;
    if (grad == 0) return;
    const DType dtype = static_cast<DType>(launch.param_dtype[b.part.tensor]);
    const DType state = static_cast<DType>(launch.state_dtype[b.part.tensor]);
    const Scalars* const rows = launch.scalars + launch.scalar_set[b.part_index] + b.age;
    const Aged* const by_age = b.part.ages ? &aged : nullptr;
    const bool stochastic = launch.stochastic && dtype != DType::f32 && !tensor.remainder;
    if (by_age) {
      (b.part.age_size == 1 ? look_up<uint8_t> : look_up<uint16_t>)(b.part, b.packed, b.n, rows, stochastic, aged);
    }
    const Operand p = operand(dtype, tensor.param, b.place, b.n, stage[0]);
    const Operand g = operand(dtype, grad, tensor.packed_grad ? b.packed : b.place, b.n, stage[1]);
    const Operand m = operand(state, tensor.exp_avg, b.packed, b.n, stage[2]);
    const Operand v = operand(state, tensor.exp_avg_sq, b.packed, b.n, stage[3]);
    const Operand x = launch.amsgrad ? operand(state, tensor.max_exp_avg_sq, b.packed, b.n, stage[4])
                                     : Operand{nullptr, false, false};
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
    const auto choose = m.bf16 ? choose_block<uint16_t> : choose_block<float>;
    uint16_t* const extras = static_cast<uint16_t*>(extra.data);
    const int64_t followed = p.staged ? b.n : b.place.followed;
    choose(p.bf16, rounding, launch.l2, launch.amsgrad, by_age != nullptr)(
        {p.data, g.data, m.data, v.data, x.data, extras, by_age, Bits{}, b.n, followed}, *rows);
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

void norm_chunk(const NormLaunch& launch, int64_t chunk) {
  double running[lanes] = {};
  alignas(64) Stage stage;
  walk(launch.work, chunk, [&](const Block& b) {
    const int64_t address = launch.tensors[b.part.tensor].data;
    if (address == 0) return;
    const DType dtype = static_cast<DType>(launch.dtype[b.part.tensor]);
    const View g = view(dtype, address, b.place, b.n, stage);
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
  walk(launch.work, chunk, [&](const Block& b) {
    const int64_t address = launch.tensors[b.part.tensor].data;
    if (address == 0) return;
    const DType dtype = static_cast<DType>(launch.dtype[b.part.tensor]);
    const View g = view(dtype, address, b.place, b.n, stage);
    for (int64_t i = 0; i < b.n; ++i) g.values[i] = g.values[i] * launch.factor;
    if (g.staged) store(dtype, g.values, b.n, address, b.place);
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
#if defined(__AVX512F__)  // a line at once takes two thirds of the time, measured on rows of 2 KB
    for (char* at = data + head; at < end; at += line)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(at), _mm512_setzero_si512());
#else
    for (char* at = data + head; at < end; at += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(at), _mm_setzero_si128());
#endif
    size -= static_cast<size_t>(end - data);
    data = end;
  }
#endif
  memset(data, 0, size);
}

template <typename T>
void zero_block(T* data, const Block& b) {
  static const T zeros[block + slack] = {};
  if (b.place.together()) {
    write_zeros(reinterpret_cast<char*>(data + b.place.start), static_cast<size_t>(b.n) * sizeof(T));
  } else {
    put(zeros, b.n, data, b.place);
  }
}

void zero_chunk(const ZeroLaunch& launch, int64_t chunk) {
  walk(launch.work, chunk, [&](const Block& b) {
    const int64_t address = launch.tensors[b.part.tensor].data;
    if (address == 0) return;
    if (width(static_cast<DType>(launch.dtype[b.part.tensor])) == 4) {
      zero_block(at<uint32_t>(address), b);
    } else {
      zero_block(at<uint16_t>(address), b);
    }
  });
#if defined(__SSE2__)
  _mm_sfence();  // streamed stores are not ordered by what ends the parallel region
#endif
}

template <typename T>
void copy_block(const T* from, const Place& source, T* to, const Place& target, int64_t n) {
  T stage[block + slack];
  const T* values = from + source.start;
  if (!source.together() || !target.together()) {
    copy_or_pick(from, source, n, stage);
    values = stage;
  }
  put(values, n, to, target);
}

void copy_chunk(const CopyLaunch& launch, int64_t chunk) {
  walk(launch.work, chunk, [&](const Block& b) {
    const PackedTensor& tensor = launch.tensors[b.part.tensor];
    if (tensor.data == 0) return;
    const auto copy = [&](auto* data, auto* twin) {
      launch.gather ? copy_block(data, b.place, twin, b.packed, b.n) : copy_block(twin, b.packed, data, b.place, b.n);
    };
    if (width(static_cast<DType>(launch.dtype[b.part.tensor])) == 4) {
      copy(at<uint32_t>(tensor.data), at<uint32_t>(tensor.packed));
    } else {
      copy(at<uint16_t>(tensor.data), at<uint16_t>(tensor.packed));
    }
  });
}

template <typename T>
void repack_elements_of(const RepackLaunch& launch, int64_t chunk) {
  T held[block + slack], stage[block + slack];
  const T* from = static_cast<const T*>(launch.from) + launch.from_at[chunk];
  T* to = static_cast<T*>(launch.to) + launch.to_at[chunk];
  const int64_t first = chunk * repack_elements;
  const int64_t end = first + repack_elements < launch.numel ? first + repack_elements : launch.numel;
  for (int64_t start = first; start < end; start += block) {
    const int64_t span = end - start < block ? end - start : block;
    Bits was{launch.old_bits, start, 0, ~0u}, now{launch.new_bits, start, 0, ~0u};
    const int64_t n_was = was.grow(span, block), n_now = now.grow(span, block);
    memcpy(held, from, static_cast<size_t>(n_was) * sizeof(T));
    memset(stage, 0, sizeof(stage));
    put_by_bits(held, was, stage);
    pick_by_bits(stage, now, held);
    memcpy(to, held, static_cast<size_t>(n_now) * sizeof(T));
    from += n_was;
    to += n_now;
  }
}

void repack_chunk(const RepackLaunch& launch, int64_t chunk) {
  launch.width == 4 ? repack_elements_of<uint32_t>(launch, chunk) : repack_elements_of<uint16_t>(launch, chunk);
}

void number_ages(const NumberLaunch& launch) {
  uint16_t* ages = launch.ages;
  const Bits live{launch.frozen_bits, 0, launch.numel, ~0u};
  if (launch.there) {
    live.each([&](int64_t i) { launch.there[launch.born[i]] = 1; });
  } else if (launch.whole) {
    live.each([&](int64_t i) { ages[i] = launch.numbers[launch.born[i]]; });
  } else {
    live.each([&](int64_t i) { *ages++ = launch.numbers[launch.born[i]]; });
  }
}

}  // namespace

const CpuKernels SAFEFREEZE_JOIN(cpu_kernels_, SAFEFREEZE_ISA) = {
    SAFEFREEZE_TEXT(SAFEFREEZE_ISA),
    adamw_chunk,
    norm_chunk,
    scale_chunk,
    zero_chunk,
    copy_chunk,
    repack_chunk,
    number_ages,
    SAFEFREEZE_JOIN(compare_, SAFEFREEZE_ISA),
};

}  // namespace safefreeze
