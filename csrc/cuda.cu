// The CUDA kernels, over work.h and calling arithmetic.h: one source with cuda_places.cuh (which elements, by whom) and
// cuda_adamw.cuh (the step). Here are the other operations, and the launches of all.
//
// tests/helpers/cuda_on_host runs this on the host: no warp-wide operations, and barriers only where all threads meet.
#include "cuda.h"

#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda_adamw.cuh"
#include "cuda_places.cuh"

namespace safefreeze::cuda {
namespace {

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
  state == DType::f32 ? by_state(F32{}) : state == DType::bf16 ? by_state(BF16{}) : by_state(Codes{});
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
