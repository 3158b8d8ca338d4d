// Where elements of a run lie, and how they get from there to a stage and back: what cpu.cpp and moves.cpp share.
// Compiled once per instruction set, all of it within each file; includes no standard C++ header with inline code,
// which the linker could otherwise take from the wrong instruction set.
#pragma once

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
  int64_t followed = 0;  // from element `start` on, how many have an element of their stretch `ahead` of them
  int64_t jump = 0;      // from the end of their stretch to the beginning of the next one
  int64_t n_rows = 0;    // rows from `rows` on in this chunk: more than the block has, if others follow
  bool shared = false;   // other threads may be writing to the elements between: touch none but one's own

  bool together() const { return !cols && !bits.bytes; }
  int64_t row_start(int64_t row) const { return rows ? rows[row].start : start; }
  // The row to fetch while `row` is picked: two ahead, since hardware prefetchers lose their way among picks (Zen 5).
  int64_t row_to_fetch(int64_t row) const { return row_start(row + 2 < n_rows ? row + 2 : row); }
};

// How far ahead memory is fetched, of the next stretch of runs too: hardware prefetchers stop at every page's end.
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
// the data comes from memory (measured on Zen 5). Only a last, short one is masked, to stay inside the tensor.
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

constexpr int group = 16;

template <typename T>
inline void pick_group(const T* data, uint64_t picked, T* out) {
  store_16(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(picked), load_16(data)));
}
template <typename T>
inline void put_group(const T* values, uint64_t picked, T* data) {
  store_16(data, _mm512_mask_expand_epi32(load_16(data), static_cast<__mmask16>(picked), load_16(values)));
}
#else
constexpr bool picks_columns_by_bits = false;
constexpr int group = 8;

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
inline void pick_group(const T* data, uint64_t picked, T* out) {
  store_8(out, _mm256_permutevar8x32_epi32(load_8(data), load_8(lanes_of.picked[picked & 0xff])));
}

template <typename T>
inline void put_group(const T* values, uint64_t picked, T* data) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(picked)), bit), bit);
  const __m256i moved = _mm256_permutevar8x32_epi32(load_8(values), load_8(lanes_of.before[picked & 0xff]));
  store_8(data, _mm256_blendv_epi8(load_8(data), moved, chosen));
}
#else
template <typename T>
inline void pick_group(const T* data, uint64_t picked, T* __restrict out) {
  for (int i = 0; i < 8; ++i) {
    *out = data[i];
    out += picked >> i & 1u;
  }
}

template <typename T>
inline void put_group(const T* __restrict values, uint64_t picked, T* data) {
  for (int i = 0; i < 8; ++i) {
    const uint64_t chosen = picked >> i & 1u;
    data[i] = chosen ? *values : data[i];
    values += chosen;
  }
}
#endif

#endif

inline int count_group(uint64_t picked) { return __builtin_popcountll(picked & ((uint64_t(1) << group) - 1u)); }

template <typename T>
struct Pick {
  const T* data;
  T* out;
  Pick(const T* from, T* to) : data(from), out(to) {}
};

// Picks from each of some arrays at once; `followed`: how many neighbours have others of their run `ahead` of them.
template <typename... T>
void pick_by_bits(const Bits& bits, int64_t followed, Pick<T>... from) {
  const auto pick = [&](int64_t i, uint64_t picked) {
    const int count = count_group(picked);
    ((pick_group(from.data + i, picked, from.out), from.out += count), ...);
  };
  int64_t i = 0;
  for (; i + 64 <= bits.span; i += 64) {
    const uint64_t picked = bits.whole(i);
    for (int k = 0; i < followed && k < 64; k += 16) (prefetch(from.data + i + k + ahead), ...);
    for (int k = 0; picked && k < 64; k += group) pick(i + k, picked >> k);
  }
  uint64_t picked = bits.rest(i);
  for (; i + group <= bits.span; i += group, picked >>= group) pick(i, picked);
  for (; picked; picked &= picked - 1u) ((*from.out++ = from.data[i + __builtin_ctzll(picked)]), ...);
}

template <typename T>
void pick_by_bits(const T* data, const Bits& bits, T* out) {
  pick_by_bits(bits, 0, Pick<T>{data, out});
}

template <typename T>
void put_by_bits(const T* values, const Bits& bits, T* data) {
  const auto put = [&](int64_t i, uint64_t picked) {
    put_group(values, picked, data + i);
    values += count_group(picked);
  };
  int64_t i = 0;
  for (; i + 64 <= bits.span; i += 64) {
    const uint64_t picked = bits.whole(i);
    for (int k = 0; picked && k < 64; k += group) put(i + k, picked >> k);
  }
  uint64_t picked = bits.rest(i);
  for (; i + group <= bits.span; i += group, picked >>= group) put(i, picked);
  for (; picked; picked &= picked - 1u) data[i + __builtin_ctzll(picked)] = *values++;
}

// Hardware gathers and scatters are slower than plain loads and stores on many processors.
#if defined(__clang__)
#define SAFEFREEZE_SCALAR_LOOP _Pragma("clang loop vectorize(disable)")
#define SAFEFREEZE_VECTOR_LOOP _Pragma("clang loop vectorize(assume_safety)")
#define SAFEFREEZE_SCALAR
#else
#define SAFEFREEZE_SCALAR_LOOP
#define SAFEFREEZE_VECTOR_LOOP _Pragma("GCC ivdep")  // of so many operands it would not check whether they overlap
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
    if (!place.shared) return pick_by_bits(here, place.bits, out);
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

inline void load_f16(const uint16_t* data, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(stored));
  }
#endif
  for (; i < n; ++i) out[i] = from_f16(data[i]);
}

inline void store_f16(const float* values, int64_t n, uint16_t* data) {
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

inline void load(DType dtype, int64_t address, const Place& place, int64_t n, float* __restrict out) {
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
inline void store(DType dtype, const float* values, int64_t n, int64_t address, const Place& place,
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

inline View view(DType dtype, int64_t address, const Place& place, int64_t n, float* stage) {
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

// Which elements from `start` on a part with bits visits; nothing of them yet.
inline Bits visited(const RunPart& part, int64_t start, bool frozen) {
  return {at<const uint8_t>(part.frozen_bits), start, 0, frozen ? 0u : ~0u};
}

// Of a part with bits a block is as many neighbours as it has room for of those that are picked.
template <typename Step>
void walk_bits(const Runs& work, const Chunk& chunk, Step step) {
  const RunPart& part = work.parts[chunk.part];
  for (int64_t r = chunk.begin; r < chunk.end; ++r) {
    const Run& run = work.runs[r];
    int64_t picked = 0;
    for (int64_t done = 0; done < run.count;) {
      Place place{run.start + done}, packed{run.packed + (part.gapless ? picked : done)};
      place.bits = visited(part, place.start, work.frozen);
      const int64_t n = place.bits.grow(run.count - done, block), span = place.bits.span;
      if (n == span) place.bits = {};
      place.shared = packed.shared = part.shared != 0;
      if (!part.gapless) packed.bits = place.bits;
      if (n) step(Block{part, chunk.part, 0, place, packed, n});
      done += span;
      picked += n;
    }
  }
}

// Runs that lie side by side, and differ in age at most.
struct Stretch {
  int64_t last = -1, end = 0;         // its last run, and the element of the tensor where that ends
  int64_t jump = 0, packed_jump = 0;  // from there to the next run of the chunk, in the tensor and in its packed twin

  void begin(const Runs& work, const Chunk& chunk, int64_t first) {
    const auto end_of = [&](int64_t r) { return work.runs[r].start + work.runs[r].count; };
    for (last = first; last + 1 < chunk.end && work.runs[last + 1].start == end_of(last);) ++last;
    end = end_of(last);
    jump = packed_jump = -ahead;  // unless something follows
    if (last + 1 < chunk.end) {
      const Run &before = work.runs[last], &next = work.runs[last + 1];
      jump = next.start - end;
      packed_jump = next.packed - before.packed - before.count;
    }
  }
};

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
  Stretch stretch;
  for (int64_t r = chunk.begin; r < chunk.end;) {
    const Run& run = work.runs[r];
    if (!cols && r > stretch.last) stretch.begin(work, chunk, r);
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
      if (!cols) {
        place.followed = stretch.end - place.start - ahead;
        place.jump = stretch.jump;
      } else {
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
      packed.jump = stretch.packed_jump;
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

}  // namespace
}  // namespace safefreeze
