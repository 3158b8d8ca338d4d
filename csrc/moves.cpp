// What moves without arithmetic: zeros, packed twins, state and ages of single elements as their frozen bits change.
// Compiled once per instruction set.
#include "places.h"

namespace safefreeze {
namespace {

int64_t width(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Written past the caches, zeros if `from` is null: nobody reads frozen gradients soon, nor state that moved, and a
// line that is to be overwritten need not be fetched first. Short stretches are not worth it.
void write_past(char* data, const char* from, size_t size) {
  const auto write = [&](size_t some) {
    if (from) {
      memcpy(data, from, some);
      from += some;
    } else {
      memset(data, 0, some);
    }
    data += some;
  };
#if defined(__SSE2__)
  constexpr size_t line = 64;
  const size_t head = (line - reinterpret_cast<uintptr_t>(data) % line) % line;
  if (size >= head + 8 * line) {
    write(head);
    size -= head;
    for (; size >= line; size -= line, data += line) {
#if defined(__AVX512F__)  // a line at once takes two thirds of the time, measured on rows of 2 KB
      const __m512i values = from ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
      _mm512_stream_si512(reinterpret_cast<__m512i*>(data), values);
#else
      for (size_t i = 0; i < line; i += 16) {
        const __m128i values = from ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)) : _mm_setzero_si128();
        _mm_stream_si128(reinterpret_cast<__m128i*>(data + i), values);
      }
#endif
      if (from) from += line;
    }
  }
#endif
  write(size);
}

// Streamed stores are not ordered by what ends the parallel region.
void end_writes() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <typename T>
void zero_block(T* data, const Block& b) {
  static const T zeros[block + slack] = {};
  if (b.place.together()) {
    write_past(reinterpret_cast<char*>(data + b.place.start), nullptr, static_cast<size_t>(b.n) * sizeof(T));
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
  end_writes();
}

template <typename T>
void copy_block(const T* from, const Place& source, T* to, const Place& target, int64_t n) {
  if (source.together() && target.together()) {
    return write_past(reinterpret_cast<char*>(to + target.start), reinterpret_cast<const char*>(from + source.start),
                      static_cast<size_t>(n) * sizeof(T));
  }
  T stage[block + slack];
  copy_or_pick(from, source, n, stage);
  put(stage, n, to, target);
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
  end_writes();
}

// Bits of 64 elements from element `start`, a multiple of 64, on; 0 beyond `end`.
inline uint64_t word_of(const uint8_t* bits, int64_t start, int64_t end) {
  uint64_t word = 0;
  if (start + 64 <= end) {
    memcpy(&word, bits + start / 8, 8);
    return word;
  }
  memcpy(&word, bits + start / 8, static_cast<size_t>((end - start + 7) / 8));
  return word & ((uint64_t(1) << (end - start)) - 1u);
}

// How many bits are clear of elements from `start` on, up to `end`.
int64_t count_clear(const uint8_t* bits, int64_t start, int64_t end) {
  int64_t count = end - start;
  for (; start < end; start += 64) count -= __builtin_popcountll(word_of(bits, start, end));
  return count;
}

// Moves what is held of 64 elements; 64 can be read and written. `was` and `now`: which are live.
template <typename T>
inline void repack_64(const T*& from, uint64_t was, T*& to, uint64_t now) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  for (int k = 0; k < 64; k += 16, was >>= 16, now >>= 16) {
    const __m512i values = _mm512_maskz_expand_epi32(static_cast<__mmask16>(was), load_16(from));
    store_16(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(now), values));
    from += count_group(was);
    to += count_group(now);
  }
#else
  T stage[64] = {};
  for (int k = 0; k < 64; k += 8, was >>= 8) {
    put_group(from, was & 0xff, stage + k);
    from += count_group(was);
  }
  for (int k = 0; k < 64; k += 8, now >>= 8) {
    pick_group(stage + k, now & 0xff, to);
    to += count_group(now);
  }
#endif
}

template <typename T>
void repack_elements(const RepackLaunch& launch, int64_t chunk) {
  const T *from = static_cast<const T*>(launch.from) + launch.from_at[chunk],
          *from_end = static_cast<const T*>(launch.from) + launch.from_at[chunk + 1];
  T *to = static_cast<T*>(launch.to) + launch.to_at[chunk],
    *to_end = static_cast<T*>(launch.to) + launch.to_at[chunk + 1];
  const int64_t first = chunk * bits_chunk;
  const int64_t end = first + bits_chunk < launch.numel ? first + bits_chunk : launch.numel;
  for (int64_t start = first; start < end; start += 64) {
    const uint64_t some = end - start < 64 ? (uint64_t(1) << (end - start)) - 1u : ~uint64_t(0);
    const uint64_t was = ~word_of(launch.old_bits, start, end) & some;
    uint64_t now = ~word_of(launch.new_bits, start, end) & some;
    if (from_end - from >= 64 && to_end - to >= 64) {
      repack_64(from, was, to, now);
      continue;
    }
    for (; now; now &= now - 1u) {  // the last few: other threads, or nobody, have what lies beyond
      const uint64_t bit = now & (~now + 1u);
      *to++ = was & bit ? from[__builtin_popcountll(was & (bit - 1u))] : T(0);
    }
    from += __builtin_popcountll(was);
  }
}

void repack_chunk(const RepackLaunch& launch, int64_t chunk) {
  const auto repack = launch.width == 4   ? repack_elements<uint32_t>
                      : launch.width == 2 ? repack_elements<uint16_t>
                                          : repack_elements<uint8_t>;
  repack(launch, chunk);
}

// Notes that an element had an entry. It is looked at first, so that threads do not fight for the line.
inline void note(uint8_t* seen) {
  if (!__atomic_load_n(seen, __ATOMIC_RELAXED)) __atomic_store_n(seen, uint8_t(1), __ATOMIC_RELAXED);
}

// Turns whole words of elements from `first` on, if a register holds what becomes of an age. Where it stopped.
int64_t turn_few(const TurnLaunch& launch, int64_t first, int64_t end) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if (launch.n_ages > 32 || launch.width != 1 || launch.turned_width != 1) return first;
  const uint8_t* const ages = static_cast<const uint8_t*>(launch.ages);
  uint8_t* const turned = static_cast<uint8_t*>(launch.turned);
  __m512i becomes[4], seen[4];
  for (int64_t way = 0; way < 4; ++way) {
    uint16_t row[32] = {};
    for (int64_t age = 0; age < launch.n_ages; ++age) {
      row[age] = static_cast<uint16_t>(launch.becomes[way * launch.n_ages + age]);
    }
    becomes[way] = _mm512_loadu_si512(row);
    seen[way] = _mm512_setzero_si512();
  }
  int64_t i = first;
  for (const int64_t stop = first + (end - first) / 64 * 64; i < stop; i += 32) {
    uint32_t was, now;
    memcpy(&was, launch.old_bits + i / 8, 4);
    memcpy(&now, launch.new_bits + i / 8, 4);
    const uint32_t ways[4] = {~was & ~now, was & ~now, ~was & now, was & now};
    const __m256i age = ages ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ages + i)) : __m256i{};
    const __m512i wide = _mm512_maskz_cvtepu8_epi16(~0u, age), one = _mm512_set1_epi32(1);
    const __m512i low = _mm512_maskz_cvtepu8_epi32(0xffff, _mm256_castsi256_si128(age));
    const __m512i high = _mm512_maskz_cvtepu8_epi32(0xffff, _mm256_extracti128_si256(age, 1));
    __m512i result = _mm512_setzero_si512();
    for (int way = 0; way < 4; ++way) {
      result = _mm512_mask_permutexvar_epi16(result, ways[way], wide, becomes[way]);
      const __mmask16 here = static_cast<__mmask16>(ways[way]), there = static_cast<__mmask16>(ways[way] >> 16);
      seen[way] = _mm512_mask_or_epi32(seen[way], here, seen[way], _mm512_maskz_sllv_epi32(0xffff, one, low));
      seen[way] = _mm512_mask_or_epi32(seen[way], there, seen[way], _mm512_maskz_sllv_epi32(0xffff, one, high));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(turned + i), _mm512_maskz_cvtepi16_epi8(~0u, result));
  }
  for (int64_t way = 0; way < 4; ++way) {
    uint32_t lanes_seen[16], some = 0;
    _mm512_storeu_si512(lanes_seen, seen[way]);
    for (const uint32_t lane : lanes_seen) some |= lane;
    for (; some; some &= some - 1u) note(launch.seen + way * launch.n_ages + __builtin_ctz(some));
  }
  return i;
#else
  (void)launch, (void)end;
  return first;
#endif
}

template <typename From, typename To>
void turn_ages(const TurnLaunch& launch, int64_t chunk) {
  const int64_t first = chunk * bits_chunk;
  const int64_t end = first + bits_chunk < launch.numel ? first + bits_chunk : launch.numel;
  const From* const ages = static_cast<const From*>(launch.ages);
  To* const turned = static_cast<To*>(launch.turned);
  for (int64_t i = turn_few(launch, first, end); i < end;) {
    uint64_t was = word_of(launch.old_bits, i, end), now = word_of(launch.new_bits, i, end);
    for (const int64_t stop = i + 64 < end ? i + 64 : end; i < stop; ++i, was >>= 1, now >>= 1) {
      const int64_t way = static_cast<int64_t>((was & 1u) | (now & 1u) << 1);
      const int64_t entry = way * launch.n_ages + (ages ? static_cast<int64_t>(ages[i]) : 0);
      turned[i] = static_cast<To>(launch.becomes[entry]);
      note(launch.seen + entry);
    }
  }
}

template <typename From>
void turn_from(const TurnLaunch& launch, int64_t chunk) {
  const auto turn = launch.turned_width == 4   ? turn_ages<From, uint32_t>
                    : launch.turned_width == 2 ? turn_ages<From, uint16_t>
                                               : turn_ages<From, uint8_t>;
  turn(launch, chunk);
}

void turn_chunk(const TurnLaunch& launch, int64_t chunk) {
  (launch.width == 4   ? turn_from<uint32_t>
   : launch.width == 2 ? turn_from<uint16_t>
                       : turn_from<uint8_t>)(launch, chunk);
}

}  // namespace

void SAFEFREEZE_JOIN(zero_, SAFEFREEZE_ISA)(const ZeroLaunch& launch, int64_t chunk) { zero_chunk(launch, chunk); }
void SAFEFREEZE_JOIN(copy_, SAFEFREEZE_ISA)(const CopyLaunch& launch, int64_t chunk) { copy_chunk(launch, chunk); }
int64_t SAFEFREEZE_JOIN(count_clear_, SAFEFREEZE_ISA)(const uint8_t* bits, int64_t start, int64_t end) {
  return count_clear(bits, start, end);
}
void SAFEFREEZE_JOIN(repack_, SAFEFREEZE_ISA)(const RepackLaunch& launch, int64_t chunk) {
  repack_chunk(launch, chunk);
}
void SAFEFREEZE_JOIN(turn_, SAFEFREEZE_ISA)(const TurnLaunch& launch, int64_t chunk) { turn_chunk(launch, chunk); }

}  // namespace safefreeze
