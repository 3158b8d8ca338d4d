// The plain structs a launch receives. kernels/runs.py and kernels/tiles.py build them; their numpy dtypes mirror
// these, and backends check when they are made that both sides agree.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace safefreeze {

// `codes`: moments in 8 bits, which are no numbers by themselves (`decode_moments`).
enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, codes = 3 };

// Elements that lie together in memory: `count` of them from element `start` of the tensor, held from element
// `packed` of its packed twin. Where the part has a column list, `start` is the first element of a row and
// the list picks `count` elements of it.
struct Run {
  int64_t start;
  int64_t packed;
  int64_t count;
  int64_t age;  // how far behind the part's first row of scalars its own is
};

// What the runs of one part of the list share.
struct RunPart {
  int64_t tensor;       // row of the address tables
  int64_t cols;         // address of int32[count], picked columns; 0: the run is contiguous
  int64_t col_bits;     // address of the same picks, one bit per column, 16 to a word; 0: too sparse to be read so
  int64_t packed_cols;  // address of int32[count], their places in a packed row; 0: 0, 1, 2, ...; `cols`: the same
  int64_t shared;       // whether other parts visit elements between this one's, perhaps in another thread
  int64_t frozen_bits;  // address of one bit per tensor element, readable 8 bytes past the end; 0: none. With bits
                        // there are no lists
  int64_t gapless;      // whether the packed twin holds what is visited alone; else a run's places lie as its elements
  int64_t ages;         // address of integers laid out as the packed twin: how far behind the part's first row of
                        // scalars that of an element is, of places that nothing visits below n_ages too; 0: they
                        // share one
  int64_t age_size;     // bytes of such an integer: 1 or 2
  int64_t n_ages;       // how many of those rows there are
};

// What one thread takes at a time: runs [begin, end) of one part, about equal in elements.
struct Chunk {
  int64_t part;
  int64_t begin;
  int64_t end;
};

// A work list as CPU kernels read it. A live list visits what trains and skips elements whose frozen bit is set; a
// frozen list visits what is frozen, and of a part with bits only the elements whose bit is set. `packed` of a run is
// where the first of those is held.
struct Runs {
  const RunPart* parts;
  const Chunk* chunks;
  const Run* runs;
  int64_t n_chunks;
  bool frozen;
};

// The same list as GPU kernels read it. A tile is what one block of threads takes, at most tile_elements elements: of a
// run, or whole pieces of `width` elements. Piece k is held from element start + cols[at + k] of the tensor and
// packed + packed_cols[at + k] of its twin; where a list is missing, pieces follow each other. Without lists width is
// 0. Of a gapless part with bits, `packed` is where the tile's first visited element is held.
constexpr int tile_elements = 8192;
struct Tile {
  int64_t start, packed;
  int32_t tensor, part, count, at, age, width;
};
struct TilePart {
  int64_t cols, packed_cols, frozen_bits, shared, gapless, ages;  // as in RunPart, in device memory; ages have 2 bytes
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
  Runs work;
  const AdamWTensor* tensors;
  const DenseTensor* grads;    // the only addresses that change from step to step
  const int32_t* param_dtype;  // DType per tensor, of parameter and gradient
  const int32_t* state_dtype;  // DType per tensor
  const int32_t* scalar_set;   // per part: its first row of scalars
  const Scalars* scalars;
  bool l2, amsgrad;
  bool stochastic;  // how bf16 and f16 parameters without remainders are rounded; else to nearest, ties to even
  uint64_t seed;
};

enum class NormKind : int32_t { sum_of_squares = 0, sum_of_absolutes = 1, largest_absolute = 2 };

struct NormLaunch {
  Runs work;
  const DenseTensor* tensors;
  const int32_t* dtype;
  NormKind kind;
  double* partial;  // one per chunk; the caller adds them in order, so the result has one value
};

struct ScaleLaunch {
  Runs work;
  const DenseTensor* tensors;
  const int32_t* dtype;
  float factor;
};

struct ZeroLaunch {
  Runs work;
  const DenseTensor* tensors;
  const int32_t* dtype;
};

// Gather (tensor -> packed) or scatter (packed -> tensor), byte for byte.
struct CopyLaunch {
  Runs work;
  const PackedTensor* tensors;
  const int32_t* dtype;
  bool gather;
};

// What threads take at a time of the two that follow, in elements of the tensor. Bits may be read to the last byte
// alone.
constexpr int64_t bits_chunk = 32768;

// What is packed by one set of frozen bits, moved to how another packs it: what is live in both is kept, the rest is 0.
struct RepackLaunch {
  const uint8_t *old_bits, *new_bits;
  const int64_t *from_at, *to_at;  // per chunk, and of the end: where its first live element is held
  int64_t numel;
  const void* from;
  void* to;
  int64_t width;  // bytes of an element: 1, 2 or 4
};

// Ages of single elements once new frozen bits replace old ones. An age is a number below `n_ages`; `becomes` says
// which it becomes: of what stays live, thaws, freezes, and stays frozen, in rows of n_ages.
struct TurnLaunch {
  const uint8_t *old_bits, *new_bits;
  int64_t numel;
  const void* ages;  // of every element; null: all have age 0
  void* turned;
  int64_t width, turned_width;  // bytes of each: 1, 2 or 4
  const uint32_t* becomes;
  uint8_t* seen;  // per entry of `becomes`, 0 before: 1 where an element had it
  int64_t n_ages;
};

}  // namespace safefreeze
