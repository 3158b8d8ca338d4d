// A part of csrc/cuda.cu: storage types, and which elements a thread takes. A block takes one tile; a thread takes a
// few of its elements at once: whole, that is neighbours, 16 bytes to an access of the widest operand, where all
// operands are aligned; else apart, with the elements of neighbouring threads side by side. All loads come before the
// arithmetic.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "cuda.h"

namespace safefreeze::cuda {
namespace {

constexpr int threads = 256;
constexpr int warp = 32;
constexpr int access = 16;  // bytes

template <typename T>
__device__ __forceinline__ T* at(int64_t address) {
  return static_cast<T*>(__cvta_global_to_generic(static_cast<size_t>(address)));
}

// ------------------------------------------------------------------------------------------------- storage types

struct F32 {
  using Stored = uint32_t;  // bits, so that moving a value never changes it
  static __device__ __forceinline__ float widen(uint32_t stored) {
    FloatBits x;
    x.bits = stored;
    return x.value;
  }
  static __device__ __forceinline__ uint32_t narrow(float value) {
    FloatBits x;
    x.value = value;
    return x.bits;
  }
};

// A pair is two values of 16 bits in one word, the first in its lower half.
struct BF16 {
  using Stored = uint16_t;
  // As `narrow`, but for a NaN, which becomes 0x7fff: one instruction. `mend` turns those into what `narrow` makes.
  static __device__ __forceinline__ uint32_t narrow_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else
    const uint32_t halves[2] = {first != first ? 0x7fffu : to_bf16(first),
                                second != second ? 0x7fffu : to_bf16(second)};
    return halves[0] | halves[1] << 16;
#endif
  }
  static __device__ __forceinline__ uint32_t mend(uint32_t pair) {
    pair ^= (pair & 0xffffu) == 0x7fffu ? 0x3fu : 0u;
    return pair ^ (pair >> 16 == 0x7fffu ? 0x3f0000u : 0u);
  }
  static __device__ __forceinline__ float widen(uint16_t stored) { return from_bf16(stored); }
  static __device__ __forceinline__ uint16_t narrow(float value) { return to_bf16(value); }
  static __device__ __forceinline__ uint16_t narrow(float value, uint16_t noise) { return to_bf16(value, noise); }
};

// A NaN is what the hardware makes of it: 0x7fff.
struct F16 {
  using Stored = uint16_t;
  static __device__ __forceinline__ uint32_t narrow_pair(float first, float second) {
#if defined(__CUDA_ARCH__)
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
#else
    return narrow(first) | static_cast<uint32_t>(narrow(second)) << 16;
#endif
  }
  static __device__ __forceinline__ float widen(uint16_t stored) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(stored));
    return value;
#else
    return from_f16(stored);
#endif
  }
  static __device__ __forceinline__ uint16_t narrow(float value) {
#if defined(__CUDA_ARCH__)
    uint16_t stored;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored) : "f"(value));
    return stored;
#else
    return value != value ? 0x7fff : to_f16(value);
#endif
  }
  static __device__ __forceinline__ uint16_t narrow(float value, uint16_t noise) { return to_f16(value, noise); }
};

// Moments of 8 bits: read and written both at once, by `decode_moments` and `encode_moments`.
struct Codes {
  using Stored = uint8_t;
};

// ------------------------------------------------------------------------------------- which elements, by whom

// Elements a thread holds at once.
template <typename T, int n>
struct alignas(n * sizeof(T) < access ? n * sizeof(T) : access) Values {
  T of[n];
};

// Changes values word by word.
template <typename T, int n, typename Change>
__device__ __forceinline__ void change_words(Values<T, n>& values, Change change) {
  char* const bytes = reinterpret_cast<char*>(&values);
#pragma unroll
  for (size_t i = 0; i < sizeof(values) / 4; ++i) {
    uint32_t word;
    std::memcpy(&word, bytes + 4 * i, 4);
    change(word);
    std::memcpy(bytes + 4 * i, &word, 4);
  }
}

// The value of one of them.
template <typename Storage, int n>
__device__ __forceinline__ float widen(const Values<typename Storage::Stored, n>& values, int i) {
  if constexpr (n > 2 && std::is_same_v<Storage, BF16>) {  // out of the word it is in, in one instruction
    uint32_t pair;
    std::memcpy(&pair, &values.of[i / 2 * 2], 4);
    return F32::widen(i % 2 ? pair & 0xffff0000u : pair << 16);
  } else {
    return Storage::widen(values.of[i]);
  }
}

// Narrows neighbours, from the i-th on, two at once where they are two. `mend` gives NaNs the bits that `narrow` does.
template <typename Storage, int n, int count>
__device__ __forceinline__ void put(Values<typename Storage::Stored, n>& into, int i, const float (&values)[count]) {
  if constexpr (count == 2 && !std::is_same_v<Storage, F32>) {
    const uint32_t pair = Storage::narrow_pair(values[0], values[1]);
    std::memcpy(&into.of[i], &pair, 4);
  } else {
#pragma unroll
    for (int k = 0; k < count; ++k) into.of[i + k] = Storage::narrow(values[k]);
  }
}
template <typename Storage, int n>
__device__ __forceinline__ void mend(Values<typename Storage::Stored, n>& values) {
  if constexpr (n % 2 == 0 && std::is_same_v<Storage, BF16>) {
    change_words(values, [](uint32_t& word) { word = BF16::mend(word); });
  }
}

// The compiler must have these values in registers here. Between two pairs of elements it keeps the work on one from
// being mixed with that on the other, for which there are not enough registers.
template <typename T, int n>
__device__ __forceinline__ void pin(Values<T, n>& values) {
  change_words(values, [](uint32_t& word) { asm volatile("" : "+r"(word)); });
}

template <typename... Registers>
__device__ __forceinline__ void pin_all(Registers&... values) {
  (pin(values), ...);
}

// A value that threads share, loaded here instead of kept since it was last used: one more register to work with.
template <typename T>
__device__ __forceinline__ T read_anew(const T& shared) {
  return *const_cast<const volatile T*>(&shared);
}

// n neighbours from the tile's element `here`, held from place `there` on; a list visits those whose bit is set in
// `chosen`.
template <int n>
struct Whole {
  static constexpr int size = n;
  static constexpr bool apart = false;
  static constexpr uint32_t all = (1u << n) - 1u;
  uint32_t here, there, chosen;

  __device__ __forceinline__ uint32_t in_tensor(int i) const { return here + i; }

  template <typename T>
  __device__ __forceinline__ Values<T, n> load(const T* tile) const {
    return *reinterpret_cast<const Values<T, n>*>(tile + here);
  }
  // From a packed twin, or from a tensor.
  template <typename T>
  __device__ __forceinline__ Values<T, n> load_either(const T* tile, bool packed) const {
    return *reinterpret_cast<const Values<T, n>*>(tile + (packed ? there : here));
  }
  // What is not chosen must be what was loaded: `blend`.
  template <typename T>
  __device__ __forceinline__ void store(T* tile, const Values<T, n>& values) const {
    *reinterpret_cast<Values<T, n>*>(tile + here) = values;
  }
  template <typename T>
  __device__ __forceinline__ Values<T, n> load_packed(const T* tile) const {
    return *reinterpret_cast<const Values<T, n>*>(tile + there);
  }
  template <typename T>
  __device__ __forceinline__ void store_packed(T* tile, const Values<T, n>& values) const {
    *reinterpret_cast<Values<T, n>*>(tile + there) = values;
  }
};

// The values of elements that are not chosen become the old ones.
template <typename T, int n>
__device__ __forceinline__ void blend(Values<T, n>& values, const Values<T, n>& old, uint32_t chosen) {
#pragma unroll
  for (int i = 0; i < n; ++i) values.of[i] = chosen >> i & 1 ? values.of[i] : old.of[i];
}

// n elements anywhere in the tile. Any of them may be read; those not `inside` are others' in truth.
template <int n>
struct Apart {
  static constexpr int size = n;
  static constexpr bool apart = true;
  uint32_t here[n], there[n], chosen, inside;

  __device__ __forceinline__ uint32_t in_tensor(int i) const { return here[i]; }

  template <typename T>
  static __device__ __forceinline__ Values<T, n> load_at(const T* tile, const uint32_t (&places)[n]) {
    Values<T, n> values;
#pragma unroll
    for (int i = 0; i < n; ++i) values.of[i] = tile[places[i]];
    return values;
  }
  template <typename T>
  static __device__ __forceinline__ void store_at(T* tile, const uint32_t (&places)[n], const Values<T, n>& values,
                                                  uint32_t which) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (which >> i & 1) tile[places[i]] = values.of[i];
    }
  }
  template <typename T>
  __device__ __forceinline__ Values<T, n> load(const T* tile) const {
    return load_at(tile, here);
  }
  template <typename T>
  __device__ __forceinline__ void store(T* tile, const Values<T, n>& values) const {
    store_at(tile, here, values, chosen);
  }
  template <typename T>
  __device__ __forceinline__ Values<T, n> load_packed(const T* tile) const {
    return load_at(tile, there);
  }
  template <typename T>
  __device__ __forceinline__ Values<T, n> load_either(const T* tile, bool packed) const {
    Values<T, n> values;
#pragma unroll
    for (int i = 0; i < n; ++i) values.of[i] = tile[packed ? there[i] : here[i]];
    return values;
  }
  template <typename T>
  __device__ __forceinline__ void store_packed(T* tile, const Values<T, n>& values) const {
    store_at(tile, there, values, chosen);
  }
};

template <typename T>
__device__ __forceinline__ int64_t misaligned(const T* address) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(address) % access);
}

// What keeps a tile from being taken whole, n elements at once: pieces of other lengths, and bits that do not begin
// with a byte.
template <int n>
__device__ __forceinline__ int64_t obstacles(const Tile& tile, const TilePart& part) {
  return tile.width % n | (part.frozen_bits ? tile.start % 8 : 0);
}

// Finds the piece that an element of a tile is in. It multiplies: right for numbers below 2^16, of widths below 2^16.
struct Pieces {
  uint32_t width, reciprocal;

  static __device__ __forceinline__ Pieces of(const Tile& tile) {
    const uint32_t width = static_cast<uint32_t>(tile.width);
    return {width, width > 1 ? 0xffffffffu / width + 1 : 0};
  }
  __device__ __forceinline__ uint32_t piece(uint32_t number) const {
    return width > 1 ? static_cast<uint32_t>(static_cast<uint64_t>(number) * reciprocal >> 32) : number;
  }
  // Where an element lies from the tile's first on: in the tensor, and in its twin.
  __device__ __forceinline__ void find(uint32_t number, const Tile& tile, const TilePart& part, uint32_t& here,
                                       uint32_t& there) const {
    const uint32_t which = piece(number), within = number - which * width, listed = tile.at + which;
    if (part.cols) here = at<const uint32_t>(part.cols)[listed] + within;
    if (part.packed_cols) there = at<const uint32_t>(part.packed_cols)[listed] + within;
  }
};

// Whether bits are set, of `size` (at most 8) elements of one byte or, size 1, of a single element.
template <int size>
__device__ __forceinline__ uint32_t bits_of(const TilePart& part, int64_t element) {
  return at<const uint8_t>(part.frozen_bits)[element / 8] >> (element % 8) & ((1u << size) - 1u);
}

// The elements that a tile of a gapless part visits, in order: found from its bits by all threads of a block, they take
// up shared memory, and what is packed is read and written side by side.
struct Visited {
  static_assert(tile_elements == 32 * threads, "a thread looks at 32 bits");
  static constexpr uint32_t group = 16;  // threads whose counts are summed before all are
  uint16_t element[tile_elements], of_thread[threads], of_group[threads / group];

  // Called by all threads of a block. How many there are.
  __device__ __forceinline__ uint32_t find(const Tile& tile, const TilePart& part, bool frozen) {
    const uint32_t first = threadIdx.x * 32, count = static_cast<uint32_t>(tile.count);
    uint32_t mine = 0;
    if (first < count) {
      const uint8_t* const bytes = at<const uint8_t>(part.frozen_bits) + (tile.start + first) / 8;
      uint64_t word = 0;  // 32 bits that begin anywhere lie in five bytes
#pragma unroll
      for (int i = 0; i < 5; ++i) word |= static_cast<uint64_t>(bytes[i]) << (8 * i);
      mine = static_cast<uint32_t>(word >> (tile.start % 8)) ^ (frozen ? 0u : ~0u);
      if (count - first < 32) mine &= (1u << (count - first)) - 1u;
    }
    of_thread[threadIdx.x] = static_cast<uint16_t>(__popc(mine));
    __syncthreads();
    if (threadIdx.x < threads / group) {
      uint32_t sum = 0;
      for (uint32_t i = 0; i < group; ++i) sum += of_thread[threadIdx.x * group + i];
      of_group[threadIdx.x] = static_cast<uint16_t>(sum);
    }
    __syncthreads();
    uint32_t before = 0, all = 0;
    for (uint32_t i = 0; i < threads / group; ++i) {
      before += i < threadIdx.x / group ? of_group[i] : 0;
      all += of_group[i];
    }
    for (uint32_t i = threadIdx.x / group * group; i < threadIdx.x; ++i) before += of_thread[i];
    for (uint32_t i = 0; i < 32; ++i) {
      if (mine >> i & 1) element[before++] = static_cast<uint16_t>(first + i);
    }
    __syncthreads();
    return all;
  }
};

// Calls `take(places)` until this thread has done its share of the tile: n elements whole, if `whole`, or if `two`
// `take(places, next)` of twice as many; and the others `slots` apart. `visited`: of a tile of a gapless part, of which
// `tile` counts the elements then and `part` has no bits.
template <int n, int slots, bool two = false, typename Take>
__device__ __forceinline__ void walk(const Tile& tile, const TilePart& part, const Pieces& pieces, bool frozen,
                                     bool whole, Take take, const Visited* visited = nullptr) {
  const uint32_t count = static_cast<uint32_t>(tile.count);
  const uint32_t wholes = whole ? count / n * n : 0;
  const uint32_t none = frozen ? 0u : ~0u;
  const auto neighbours = [&](uint32_t number) {
    const uint32_t bits = part.frozen_bits ? bits_of<n>(part, tile.start + number) ^ none : ~0u;
    Whole<n> places{number, number, bits & Whole<n>::all};
    if (pieces.width) pieces.find(number, tile, part, places.here, places.there);
    return places;
  };
#pragma unroll 1
  for (uint32_t number = threadIdx.x * n; number < wholes; number += threads * n * (two ? 2 : 1)) {
    if constexpr (two) {
      if (number + threads * n < wholes) {
        take(neighbours(number), neighbours(number + threads * n));
        continue;
      }
    }
    take(neighbours(number));
  }
  // Packed places of a warp begin where 32 bytes do: what is visited there lies side by side.
  const int32_t skew = visited && count ? static_cast<int32_t>(tile.packed % warp) : 0;
#pragma unroll 1
  for (int32_t first = static_cast<int32_t>(wholes + threadIdx.x) - skew; first < static_cast<int32_t>(count);
       first += threads * slots) {
    Apart<slots> places;
    places.chosen = places.inside = 0;
#pragma unroll
    for (int i = 0; i < slots; ++i) {
      const uint32_t inside = first + i * threads < count, number = inside ? first + i * threads : count - 1;
      // Where registers are scarcest, nothing that threads share is kept from one turn to the next.
      if constexpr (slots == 1) asm volatile("" ::: "memory");
      uint32_t here = visited ? visited->element[number] : number, there = number;
      if (pieces.width) pieces.find(number, tile, part, here, there);
      places.here[i] = here;
      places.there[i] = there;
      const uint32_t bit = part.frozen_bits ? bits_of<1>(part, tile.start + here) ^ none : 1u;
      places.inside |= inside << i;
      places.chosen |= (inside & bit) << i;
    }
    take(places);
  }
}

}  // namespace
}  // namespace safefreeze::cuda
