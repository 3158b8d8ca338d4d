// The CUDA kernels. Addresses are of device memory unless said otherwise. Nothing here waits for the device: launches
// are queued and the call returns. Throws std::runtime_error if one is refused.
#pragma once

#include <cstddef>

#include "work.h"

namespace safefreeze::cuda {

// Where launches go: a stream of the caller's, and the device it belongs to.
struct Queue {
  int device;
  void* stream;
};

// Copies host memory to the device inside launch parameters: what was passed may change as soon as the call returns,
// and a captured graph keeps its own copy. Writes up to the next multiple of 8 bytes.
void upload(const Queue& queue, const void* from, size_t size, void* to);

struct AdamWTiles {
  Tiles work;
  const AdamWTensor* tensors;
  const DenseTensor* grads;
  const int32_t* scalar_set;  // per part: its first row
  const Scalars* scalars;
  const float* skip;        // where it points to something other than zero nothing is done; null: never
  const float* multiplier;  // multiplies grad_multiplier of all scalars; null: 1
  uint64_t seed;
  bool l2;
};
enum class Rounding : int32_t { nearest = 0, stochastic = 1, remainder = 2 };  // of 16-bit parameters

// `param` and `state` are the dtypes of every tensor the tiles belong to.
void adamw(const Queue& queue, const AdamWTiles& launch, DType param, DType state, Rounding rounding, bool amsgrad);

// One partial result for each block: norm_blocks(n_tiles) of them; `total` adds up, or takes the largest of, `n` in
// order.
int64_t norm_blocks(int64_t n_tiles);
void norm(const Queue& queue, const Tiles& work, const DenseTensor* tensors, DType dtype, NormKind kind,
          double* partial);
void total(const Queue& queue, const double* partial, int64_t n, NormKind kind, double* result);

// Multiplies by `*factor`; where that is 1 or more nothing is done.
void scale(const Queue& queue, const Tiles& work, const DenseTensor* tensors, DType dtype, const float* factor);

void zero(const Queue& queue, const Tiles& work, const DenseTensor* tensors, DType dtype);

// Gathers into the packed twins, or scatters out of them.
void copy(const Queue& queue, const Tiles& work, const PackedTensor* tensors, DType dtype, bool gather);

// The CUDA version this was built with, and the newest one the driver knows; 0: there is no driver. As 1000 * major +
// 10 * minor. Neither makes use of a device.
int runtime_version();
int driver_version();

// Why kernels cannot run on a device; empty: they can.
const char* refusal(int device);

}  // namespace safefreeze::cuda
