// The plain structs a launch receives. worklist.py builds them; its numpy dtypes mirror these, and the binding
// checks at import that both sides agree.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace safefreeze {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

// Elements that lie together in memory: `count` of them from element `start` of the tensor, held from element
// `packed` of its packed twin. Where the segment has a column list, `start` is the first element of a row and
// the list picks `count` elements of it.
struct Run {
  int64_t start;
  int64_t packed;
  int64_t count;
};

// Runs of one tensor that share a scalar set.
struct Segment {
  int64_t tensor;       // row of the address tables
  int64_t cols;         // address of int32[count], picked columns; 0: the run is contiguous
  int64_t col_bits;     // address of the same picks, one bit per column, 16 to a word; 0: too sparse to be read so
  int64_t packed_cols;  // address of int32[count], their places in a packed row; 0: 0, 1, 2, ...
  int64_t shared;       // whether other segments visit elements between this one's, perhaps in another thread
  int64_t frozen_bits;  // address of one bit per tensor element, readable 8 bytes past the end; 0: none
};

// What one thread takes at a time: runs [begin, end) of one segment, about equal in elements.
struct Piece {
  int64_t segment;
  int64_t begin;
  int64_t end;
};

// A plan compiled against tensor shapes. A live list visits what trains and skips elements whose frozen bit is
// set; a frozen list visits what is frozen, and of a segment with bits only the elements whose bit is set, which
// its packed twin holds without gaps.
struct WorkList {
  const Segment* segments;
  const Piece* pieces;
  const Run* runs;
  int64_t n_pieces;
  bool frozen;
};

// The list as GPU kernels read it (device.py makes it): what one block of threads takes, at most tile_elements elements
// of a run. Element i is element start + cols[at + i] of the tensor and packed + packed_cols[at + i] of its twin, or
// start + i and packed + i where a list is missing. Of a frozen list with bits, `packed` is where the tile's first
// chosen element is held.
constexpr int tile_elements = 8192;
struct Tile {
  int64_t start, packed;
  int32_t tensor, part, count, at;
};
struct TilePart {
  int64_t cols, packed_cols, frozen_bits, shared;  // as in Segment; in device memory
};
struct Tiles {
  const Tile* tiles;
  const TilePart* parts;
  int64_t n_tiles;
  bool frozen;
};

// One row of addresses per tensor. A tensor whose gradient is at 0 is left alone.
struct AdamWTensor {
  int64_t param, exp_avg, exp_avg_sq, max_exp_avg_sq;
  int64_t remainder;    // packed: the lower halves of float32 masters whose upper halves are the (bf16) parameter; or 0
  int64_t number;       // tells tensors apart in the noise of stochastic rounding
  int64_t packed_grad;  // whether the gradient is packed, as the state is
};
struct DenseTensor {
  int64_t data;
};
struct PackedTensor {
  int64_t data, packed;
};

struct AdamWLaunch {
  WorkList work;
  const AdamWTensor* tensors;
  const DenseTensor* grads;    // the only addresses that change from step to step
  const int32_t* param_dtype;  // DType per tensor, of parameter and gradient
  const int32_t* state_dtype;  // DType per tensor
  const int32_t* scalar_set;   // per segment
  const Scalars* scalars;
  bool l2, amsgrad;
  bool stochastic;  // how bf16 and f16 parameters without remainders are rounded; else to nearest, ties to even
  uint64_t seed;
};

enum class NormKind : int32_t { sum_of_squares = 0, sum_of_absolutes = 1, largest_absolute = 2 };

struct NormLaunch {
  WorkList work;
  const DenseTensor* tensors;
  const int32_t* dtype;
  NormKind kind;
  double* partial;  // one per piece; the caller adds them in order, so the result has one value
};

struct ScaleLaunch {
  WorkList work;
  const DenseTensor* tensors;
  const int32_t* dtype;
  float factor;
};

struct ZeroLaunch {
  WorkList work;
  const DenseTensor* tensors;
  const int32_t* dtype;
};

// Gather (tensor -> packed) or scatter (packed -> tensor), byte for byte.
struct CopyLaunch {
  WorkList work;
  const PackedTensor* tensors;
  const int32_t* dtype;
  bool gather;
};

}  // namespace safefreeze
