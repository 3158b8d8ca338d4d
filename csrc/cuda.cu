// Kernels over work.h calling arithmetic.h. A block takes one tile; a thread takes a few of its elements at once:
// whole, that is neighbours, 16 bytes to an access of the widest operand, where all operands are aligned; else apart,
// with the elements of neighbouring threads side by side. All loads come before the arithmetic.
//
// tests/helpers/cuda_on_host runs this file on the host: no warp-wide operations, and barriers only where all threads
// meet.
#include "cuda.h"

#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

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

// ------------------------------------------------------------------------------------------------ the operations

// noise_of, for an element that is not known when compiling: registers cannot be indexed.
__device__ __forceinline__ uint16_t noise_at(const Words& eight, uint32_t element) {
  const uint32_t even = element & 4 ? eight.word[2] : eight.word[0], odd = element & 4 ? eight.word[3] : eight.word[1];
  return noise_of({{element & 2 ? odd : even}}, element & 1);
}

// What an AdamW step is made of at compile time: storage types, rounding of the parameter, and what follows from these.
template <typename P_, typename S_, Rounding rounding, bool amsgrad_>
struct AdamWKind {
  using P = P_;
  using S = S_;
  using Param = typename P::Stored;
  using State = typename S::Stored;
  static constexpr bool amsgrad = amsgrad_;
  static constexpr bool remainder = rounding == Rounding::remainder, stochastic = rounding == Rounding::stochastic;
  static constexpr bool nearest = !remainder && !stochastic;
  // Of the widest operand 16 bytes: those of a warp's threads lie side by side, and of others too.
  static constexpr int whole = access / (sizeof(Param) > sizeof(State) ? sizeof(Param) : sizeof(State));
  // As many as there are registers for.
  static constexpr bool many = amsgrad && remainder;  // operands
  static constexpr int apart = stochastic || many ? 1 : 2;
};

// What the threads of a block share: in shared memory it takes up no registers.
template <typename Kind>
struct AdamWTask {
  Tile tile;
  TilePart part;
  Pieces pieces;
  AdamWTensor tensor;  // from the tile's first element on, as ages
  int64_t grad;
  const Scalars* rows;  // the part's
  uint32_t number;
  bool whole, gapless;
  Scalars scalars;

  __device__ __forceinline__ void prepare(const AdamWTiles& launch) {
    constexpr int64_t param = sizeof(typename Kind::Param), state = sizeof(typename Kind::State);
    const Tile t = launch.work.tiles[blockIdx.x];
    const TilePart of = launch.work.parts[t.part];
    AdamWTensor from = launch.tensors[t.tensor];
    int64_t g = launch.grads[t.tensor].data;
    const Scalars* const first_row = launch.scalars + launch.scalar_set[t.part] + t.age;
    from.param += t.start * param;
    from.exp_avg += t.packed * state;
    from.exp_avg_sq += t.packed * state;
    from.max_exp_avg_sq += t.packed * state;
    from.remainder += t.packed * 2;
    if (g) g += (from.packed_grad ? t.packed : t.start) * param;
    const int64_t params = from.param | g,
                  states = from.exp_avg | from.exp_avg_sq | (Kind::amsgrad ? from.max_exp_avg_sq : 0);
    constexpr int64_t n = Kind::whole;
    // Whole, frozen elements are written back as they are: no other part may visit them meanwhile.
    whole = (params % (n * param) | states % (n * state) | (Kind::remainder ? from.remainder % (n * 2) : 0) |
             obstacles<n>(t, of) | of.ages | (of.frozen_bits ? of.shared | of.gapless : 0) |
             (Kind::stochastic ? t.start % n : 0)) == 0;
    gapless = of.frozen_bits && of.gapless;
    tile = t;
    part = of;
    pieces = Pieces::of(t);
    if (of.ages) part.ages += t.packed * 2;
    tensor = from;
    grad = g;
    number = static_cast<uint32_t>(from.number);
    rows = first_row;
    scalars = *first_row;
    if (launch.multiplier) scalars.grad_multiplier = scalars.grad_multiplier * *launch.multiplier;
  }
};

// The elements a thread holds, as they are stored.
template <typename Kind, int n>
struct AdamWValues {
  using P = typename Kind::P;
  using S = typename Kind::S;
  Values<typename Kind::Param, n> p, g;
  Values<typename Kind::State, n> m, v, v_max;
  Values<uint16_t, n> r, age;

  template <typename Places>
  __device__ __forceinline__ void load(const AdamWTask<Kind>& task, const Places& places) {
    p = places.load(at<typename Kind::Param>(task.tensor.param));
    const auto* const grad = at<const typename Kind::Param>(task.grad);
    g = places.load_either(grad, read_anew(task.tensor.packed_grad) != 0);
    m = places.load_packed(at<typename Kind::State>(task.tensor.exp_avg));
    v = places.load_packed(at<typename Kind::State>(task.tensor.exp_avg_sq));
    if constexpr (Kind::amsgrad) v_max = places.load_packed(at<typename Kind::State>(task.tensor.max_exp_avg_sq));
    if constexpr (Kind::remainder) r = places.load_packed(at<uint16_t>(task.tensor.remainder));
    if constexpr (Places::apart) {
      if (task.part.ages) age = places.load_packed(at<const uint16_t>(task.part.ages));
    }
  }

  template <typename Places>
  __device__ __forceinline__ void store(const AdamWTask<Kind>& task, const Places& places) {
    if constexpr (!Places::apart) {
      if (places.chosen != Places::all) keep_old(task, places);
    }
    places.store(at<typename Kind::Param>(task.tensor.param), p);
    places.store_packed(at<typename Kind::State>(task.tensor.exp_avg), m);
    places.store_packed(at<typename Kind::State>(task.tensor.exp_avg_sq), v);
    if constexpr (Kind::amsgrad) places.store_packed(at<typename Kind::State>(task.tensor.max_exp_avg_sq), v_max);
    if constexpr (Kind::remainder) places.store_packed(at<uint16_t>(task.tensor.remainder), r);
  }

  __device__ __forceinline__ float param(int i) const {
    if constexpr (Kind::remainder) {
      return from_remainder(p.of[i], r.of[i]);
    } else {
      return widen<P>(p, i);
    }
  }

  // The new values of elements i to i + count - 1. `noise(k)`: 16 bits for element i + k, of stochastic rounding.
  template <int count, typename Noise>
  __device__ __forceinline__ void keep(int i, const float (&new_p)[count], const float (&new_m)[count],
                                       const float (&new_v)[count], const float (&new_v_max)[count], Noise noise) {
    put<S>(m, i, new_m);
    put<S>(v, i, new_v);
    if constexpr (Kind::amsgrad) put<S>(v_max, i, new_v_max);
    if constexpr (Kind::nearest) put<P>(p, i, new_p);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      some_nan |= new_p[k] != new_p[k];  // where a moment is
      if constexpr (Kind::remainder) p.of[i + k] = to_remainder(new_p[k], r.of[i + k]);
      if constexpr (Kind::stochastic) p.of[i + k] = P::narrow(new_p[k], noise(k));
    }
    if constexpr (n > 1) {
      pin_all(p, g, m, v);
      if constexpr (Kind::amsgrad) pin(v_max);
      if constexpr (Kind::remainder) pin(r);
    }
  }

  // After the last element.
  __device__ __forceinline__ void finish() {
    if (!some_nan) return;
    mend<S>(m);
    mend<S>(v);
    if constexpr (Kind::amsgrad) mend<S>(v_max);
    if constexpr (Kind::nearest) mend<P>(p);
  }

 private:
  bool some_nan = false;

  // Reads them again: kept since they were loaded, they would take up registers.
  __device__ __forceinline__ void keep_old(const AdamWTask<Kind>& task, Whole<n> places) {
    asm volatile("" : "+r"(places.here), "+r"(places.there));
    const auto again = [&](auto& values, const auto& old) { blend(values, old, places.chosen); };
    again(p, places.load(at<typename Kind::Param>(task.tensor.param)));
    again(m, places.load_packed(at<typename Kind::State>(task.tensor.exp_avg)));
    again(v, places.load_packed(at<typename Kind::State>(task.tensor.exp_avg_sq)));
    if constexpr (Kind::amsgrad) again(v_max, places.load_packed(at<typename Kind::State>(task.tensor.max_exp_avg_sq)));
    if constexpr (Kind::remainder) again(r, places.load_packed(at<uint16_t>(task.tensor.remainder)));
  }
};

template <typename P, typename S, Rounding rounding, bool amsgrad>
__global__ void __launch_bounds__(threads, 4) adamw_kernel(const __grid_constant__ AdamWTiles launch) {
  using Kind = AdamWKind<P, S, rounding, amsgrad>;
  __shared__ AdamWTask<Kind> task;
  if (launch.skip && *launch.skip != 0.0f) return;
  __shared__ Visited visited;
  if (threadIdx.x == 0) task.prepare(launch);
  __syncthreads();
  if (!task.grad) return;
  if (task.gapless) {
    const uint32_t found = visited.find(task.tile, task.part, false);
    if (threadIdx.x == 0) {
      task.tile.count = static_cast<int32_t>(found);
      task.part.frozen_bits = 0;
    }
    __syncthreads();
  }
  Scalars s = task.scalars;
  const auto take = [&, s](const auto& places) mutable {
    using Places = std::remove_reference_t<decltype(places)>;
    constexpr int size = Places::size;
    AdamWValues<Kind, size> values;
    values.load(task, places);
    [[maybe_unused]] Words eight{};
    if constexpr (Kind::stochastic) {  // of eight neighbours, of the half of them that these are, or of one element
      uint32_t step = s.step;
      if constexpr (Places::apart) {
        if (task.part.ages) step = task.rows[values.age.of[0]].step;
      }
      const int64_t first = task.tile.start + places.in_tensor(0);
      eight = noise_of_eight(launch.seed, step, task.number, first / 8);
      if (size == 4 && first & 4) eight = {{eight.word[2], eight.word[3]}};
    }
    constexpr int count = Places::apart ? 1 : 2;
#pragma unroll
    for (int i = 0; i < size; i += count) {
      float p[count], m[count], v[count], v_max[count] = {};
      if constexpr (Kind::many) {
        s.grad_multiplier = read_anew(task.scalars.grad_multiplier);
        s.decay = read_anew(task.scalars.decay);
        s.beta1 = read_anew(task.scalars.beta1);
        s.one_minus_beta1 = read_anew(task.scalars.one_minus_beta1);
        s.beta2 = read_anew(task.scalars.beta2);
        s.one_minus_beta2 = read_anew(task.scalars.one_minus_beta2);
        s.step_size = read_anew(task.scalars.step_size);
        s.bias2_sqrt = read_anew(task.scalars.bias2_sqrt);
        s.eps = read_anew(task.scalars.eps);
      }
      const auto update = [&](auto l2) {
#pragma unroll
        for (int k = 0; k < count; ++k) {
          Scalars own = s;
          if constexpr (Places::apart) {
            if (task.part.ages) {
              const Scalars& row = task.rows[values.age.of[i + k]];
              own.step_size = row.step_size;
              own.bias2_sqrt = row.bias2_sqrt;
            }
          }
          m[k] = widen<S>(values.m, i + k);
          v[k] = widen<S>(values.v, i + k);
          if constexpr (amsgrad) v_max[k] = widen<S>(values.v_max, i + k);
          p[k] = values.param(i + k);
          const float g = widen<P>(values.g, i + k);
          safefreeze::adamw<decltype(l2)::value, amsgrad>(p[k], g, m[k], v[k], v_max[k], own);
        }
      };
      launch.l2 ? update(std::true_type{}) : update(std::false_type{});
      values.template keep<count>(i, p, m, v, v_max, [&](int k) {
        const uint32_t element = static_cast<uint32_t>(task.tile.start) + places.in_tensor(i + k);
        return size >= 4 ? noise_of(eight, i + k) : noise_at(eight, element);
      });
    }
    values.finish();
    values.store(task, places);
  };
  walk<Kind::whole, Kind::apart>(task.tile, task.part, task.pieces, false, task.whole, take,
                                 task.gapless ? &visited : nullptr);
}

template <typename P>
__global__ void __launch_bounds__(threads)
    scale_kernel(const __grid_constant__ Tiles work, const DenseTensor* tensors, const float* factor_at) {
  using T = typename P::Stored;
  constexpr int n = access / sizeof(T);
  const float factor = *factor_at;
  if (factor >= 1.0f) return;
  const Tile tile = work.tiles[blockIdx.x];
  const TilePart part = work.parts[tile.part];
  if (!tensors[tile.tensor].data) return;
  T* const data = at<T>(tensors[tile.tensor].data) + tile.start;
  const bool whole = (misaligned(data) | obstacles<n>(tile, part) | (part.frozen_bits ? part.shared : 0)) == 0;
  walk<n, 4>(tile, part, Pieces::of(tile), work.frozen, whole, [&](const auto& places) {
    auto values = places.load(data);
    const auto old = values;
    bool some_nan = false;
#pragma unroll
    for (int i = 0; i < places.size; i += 2) {
      const float scaled[] = {widen<P>(values, i) * factor, widen<P>(values, i + 1) * factor};
      some_nan |= scaled[0] != scaled[0] || scaled[1] != scaled[1];
      put<P>(values, i, scaled);
    }
    if (some_nan) mend<P>(values);
    if constexpr (!std::remove_reference_t<decltype(places)>::apart) {
      if (places.chosen != places.all) blend(values, old, places.chosen);
    }
    places.store(data, values);
  });
}

template <typename T>
__global__ void __launch_bounds__(threads) zero_kernel(const __grid_constant__ Tiles work, const DenseTensor* tensors) {
  constexpr int n = access / sizeof(T);
  const Tile tile = work.tiles[blockIdx.x];
  const TilePart part = work.parts[tile.part];
  if (!tensors[tile.tensor].data) return;
  T* const data = at<T>(tensors[tile.tensor].data) + tile.start;
  // Written whole, what is not chosen would have to be read first.
  const bool whole = (misaligned(data) | obstacles<n>(tile, part) | part.frozen_bits) == 0;
  walk<n, 4>(tile, part, Pieces::of(tile), work.frozen, whole, [&](const auto& places) {
    places.store(data, Values<T, std::remove_reference_t<decltype(places)>::size>{});
  });
}

template <typename T>
__global__ void __launch_bounds__(threads)
    copy_kernel(const __grid_constant__ Tiles work, const PackedTensor* tensors, bool gather) {
  constexpr int n = access / sizeof(T);
  __shared__ Visited visited;
  Tile tile = work.tiles[blockIdx.x];
  TilePart part = work.parts[tile.part];
  T* const data = at<T>(tensors[tile.tensor].data) + tile.start;
  T* const twin = at<T>(tensors[tile.tensor].packed) + tile.packed;
  const bool gapless = part.frozen_bits && part.gapless;
  const bool whole = (misaligned(data) | misaligned(twin) | obstacles<n>(tile, part) | part.frozen_bits) == 0;
  if (gapless) {
    tile.count = static_cast<int32_t>(visited.find(tile, part, work.frozen));
    part.frozen_bits = 0;
  }
  const auto take = [&](const auto& places) {
    if (gather) {
      places.store_packed(twin, places.load(data));
    } else {
      places.store(data, places.load_packed(twin));
    }
  };
  walk<n, 4>(tile, part, Pieces::of(tile), work.frozen, whole, take, gapless ? &visited : nullptr);
}

// ---------------------------------------------------------------------------------------------------------- norms

// What `so_far + x * x` is in doubles, by one operation on them. There are GPUs that do 64 on floats in the time of one
// on doubles or of a conversion: so |x| 2^-896 and |x| 2^896 are made by moving the exponent, and their product is
// exact. Infinity and NaN stay what they are, zero is zero; a denormal x counts wrongly, by less than 2^-252.
__device__ __forceinline__ double add_square(double so_far, float x) {
  const uint32_t bits = F32::narrow(x), upper = bits >> 3 & 0x0fffffffu, lower = bits << 29;
  return fma(__hiloint2double(upper, lower), __hiloint2double(upper + (1792u << 20), lower), so_far);
}

// Below this a sum of squares may be one of denormals; above, 2^40 of them change nothing.
constexpr double tiny = 0x1p-160;

template <NormKind kind, bool denormals>
__device__ __forceinline__ double accumulate(double so_far, float value) {
  if (kind == NormKind::sum_of_squares && !denormals) return add_square(so_far, value);
  const double x = value, magnitude = x < 0 ? -x : x;
  if (kind == NormKind::sum_of_squares) return fma(x, x, so_far);
  if (kind == NormKind::sum_of_absolutes) return so_far + magnitude;
  return magnitude > so_far || magnitude != magnitude ? magnitude : so_far;
}

template <NormKind kind>
__device__ __forceinline__ double merge(double one, double other) {
  if (kind != NormKind::largest_absolute) return one + other;
  return other > one || other != other ? other : one;
}

// Every thread brings a value; they are merged in an order that never changes, most by a few threads alone.
template <NormKind kind>
__device__ __forceinline__ void merge_block(double value, double* result) {
  constexpr int some = 16;
  __shared__ double of_thread[threads], of_some[some];
  of_thread[threadIdx.x] = value;
  __syncthreads();
  if (threadIdx.x < some) {
    for (int i = threadIdx.x + some; i < threads; i += some) value = merge<kind>(value, of_thread[i]);
    of_some[threadIdx.x] = value;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < some; ++i) value = merge<kind>(value, of_some[i]);
    *result = value;
  }
}

// What a thread finds in tiles a grid apart.
template <typename P, NormKind kind, bool denormals>
__device__ __forceinline__ double norm_of_share(const Tiles& work, const DenseTensor* tensors) {
  using T = typename P::Stored;
  constexpr int n = access / sizeof(T);
  double so_far = 0;
  const auto add = [&](auto& values, const auto& places) {
    if (places.chosen != (1u << places.size) - 1u) blend(values, {}, places.chosen);
#pragma unroll
    for (int i = 0; i < places.size; ++i) so_far = accumulate<kind, denormals>(so_far, widen<P>(values, i));
  };
#pragma unroll 1
  for (int64_t number = blockIdx.x; number < work.n_tiles; number += gridDim.x) {
    const Tile tile = work.tiles[number];
    const TilePart part = work.parts[tile.part];
    if (!tensors[tile.tensor].data) continue;
    const T* const data = at<const T>(tensors[tile.tensor].data) + tile.start;
    const bool whole = (misaligned(data) | obstacles<n>(tile, part)) == 0;
    walk<n, 4, true>(tile, part, Pieces::of(tile), work.frozen, whole, [&](const auto&... places) {
      [&](auto... values) {  // all are loaded before the first is looked at
        (pin(values), ...);
        (add(values, places), ...);
      }(places.load(data)...);
    });
  }
  return so_far;
}

template <typename P, NormKind kind>
__global__ void __launch_bounds__(threads)
    norm_kernel(const __grid_constant__ Tiles work, const DenseTensor* tensors, double* partial) {
  constexpr bool squares = kind == NormKind::sum_of_squares;
  double found = norm_of_share<P, kind, !squares>(work, tensors);
  if (squares && found > 0 && found < tiny) found = norm_of_share<P, kind, true>(work, tensors);
  merge_block<kind>(found, partial + blockIdx.x);
}

template <NormKind kind>
__global__ void __launch_bounds__(threads) total_kernel(const double* partial, int64_t n, double* result) {
  double so_far = 0;
  for (int64_t i = threadIdx.x; i < n; i += threads) so_far = merge<kind>(so_far, partial[i]);
  merge_block<kind>(so_far, result);
}

// --------------------------------------------------------------------------------------------------------- launches

template <int size>
struct Bytes {
  uint64_t word[size / 8];
};

template <int size>
__global__ void upload_kernel(const __grid_constant__ Bytes<size> bytes, uint64_t* to, int words) {
  const int word = static_cast<int>(blockIdx.x * threads + threadIdx.x);
  if (word < words) to[word] = bytes.word[word];
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// Makes a device current while it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = device != before_;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <typename... Parameters, typename... Arguments>
void launch_blocks(const Queue& queue, int64_t blocks, const char* what, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error(std::string("CUDA: ") + what + ": the work list is too long");
  const OnDevice current(queue.device);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(queue.stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

// Calls `with(F32{})` or with another storage type, or `with(uint32_t{})` or uint16_t where only its width matters.
template <typename With>
void with_dtype(DType dtype, With with) {
  if (dtype == DType::f32) return with(F32{});
  if (dtype == DType::bf16) return with(BF16{});
  with(F16{});
}
template <typename With>
void with_width(DType dtype, With with) {
  if (dtype == DType::f32) return with(uint32_t{});
  with(uint16_t{});
}
template <typename With>
void with_kind(NormKind kind, With with) {
  if (kind == NormKind::sum_of_squares) return with(std::integral_constant<NormKind, NormKind::sum_of_squares>{});
  if (kind == NormKind::sum_of_absolutes) return with(std::integral_constant<NormKind, NormKind::sum_of_absolutes>{});
  with(std::integral_constant<NormKind, NormKind::largest_absolute>{});
}

template <typename P, typename S, Rounding rounding>
void launch_adamw(const Queue& queue, const AdamWTiles& launch, bool amsgrad) {
  launch_blocks(queue, launch.work.n_tiles, "adamw",
                amsgrad ? adamw_kernel<P, S, rounding, true> : adamw_kernel<P, S, rounding, false>, launch);
}

}  // namespace

void upload(const Queue& queue, const void* from, size_t size, void* to) {
  // Launch parameters may be 4 KB, and 32 KB from CUDA 12.1 on.
  constexpr size_t small = 4000, large = CUDART_VERSION >= 12010 ? 32000 : small;
  const auto part = [&](auto bytes, size_t done, size_t n) {
    std::memcpy(bytes.word, static_cast<const char*>(from) + done, n);
    const int words = static_cast<int>((n + 7) / 8);
    launch_blocks(queue, (words + threads - 1) / threads, "upload", upload_kernel<sizeof(bytes)>, bytes,
                  reinterpret_cast<uint64_t*>(static_cast<char*>(to) + done), words);
  };
  for (size_t done = 0; done < size;) {
    const size_t n = size - done < large ? size - done : large;
    if (n <= small) {
      part(Bytes<small>{}, done, n);
    } else {
      part(Bytes<large>{}, done, n);
    }
    done += n;
  }
}

void adamw(const Queue& queue, const AdamWTiles& launch, DType param, DType state, Rounding rounding, bool amsgrad) {
  const auto by_state = [&](auto s) {
    using S = decltype(s);
    if (param == DType::f32) {
      launch_adamw<F32, S, Rounding::nearest>(queue, launch, amsgrad);
    } else if (param == DType::f16) {
      (rounding == Rounding::stochastic ? launch_adamw<F16, S, Rounding::stochastic>
                                        : launch_adamw<F16, S, Rounding::nearest>)(queue, launch, amsgrad);
    } else {
      (rounding == Rounding::stochastic  ? launch_adamw<BF16, S, Rounding::stochastic>
       : rounding == Rounding::remainder ? launch_adamw<BF16, S, Rounding::remainder>
                                         : launch_adamw<BF16, S, Rounding::nearest>)(queue, launch, amsgrad);
    }
  };
  state == DType::f32 ? by_state(F32{}) : by_state(BF16{});
}

int64_t norm_blocks(int64_t n_tiles) { return n_tiles < 4096 ? n_tiles : 4096; }

void norm(const Queue& queue, const Tiles& work, const DenseTensor* tensors, DType dtype, NormKind kind,
          double* partial) {
  with_dtype(dtype, [&](auto storage) {
    with_kind(kind, [&](auto k) {
      launch_blocks(queue, norm_blocks(work.n_tiles), "norm", norm_kernel<decltype(storage), k.value>, work, tensors,
                    partial);
    });
  });
}

void total(const Queue& queue, const double* partial, int64_t n, NormKind kind, double* result) {
  with_kind(kind, [&](auto k) { launch_blocks(queue, 1, "norm", total_kernel<k.value>, partial, n, result); });
}

void scale(const Queue& queue, const Tiles& work, const DenseTensor* tensors, DType dtype, const float* factor) {
  with_dtype(dtype, [&](auto storage) {
    launch_blocks(queue, work.n_tiles, "scale", scale_kernel<decltype(storage)>, work, tensors, factor);
  });
}

void zero(const Queue& queue, const Tiles& work, const DenseTensor* tensors, DType dtype) {
  with_width(dtype, [&](auto word) {
    launch_blocks(queue, work.n_tiles, "zero", zero_kernel<decltype(word)>, work, tensors);
  });
}

void copy(const Queue& queue, const Tiles& work, const PackedTensor* tensors, DType dtype, bool gather) {
  with_width(dtype, [&](auto word) {
    launch_blocks(queue, work.n_tiles, "copy", copy_kernel<decltype(word)>, work, tensors, gather);
  });
}

int runtime_version() { return CUDART_VERSION; }

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

const char* refusal(int device) {
  const OnDevice current(device);
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, zero_kernel<uint32_t>);
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

}  // namespace safefreeze::cuda
