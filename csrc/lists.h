// Work lists for the CPU, made from parts of kernels/parts.py: the twin of what kernels/runs.py does without it.
#pragma once

#include <cstdint>
#include <vector>

#include "work.h"

namespace safefreeze {

// The different ones of `n` numbers, 0 or more and ascending; `which` of them each number is.
std::vector<int64_t> distinct(const int64_t* numbers, int64_t n, int64_t* which);

// What runs are made of: rows of one part. A null pointer stands for 0, 1, 2, ...
struct ListedRows {
  const int64_t* rows;    // of the tensor
  const int64_t* places;  // rows of its packed twin
  const int64_t* ages;    // which age each has; null: all the first
  int64_t n_rows;         // how many there are
  int64_t width, packed_width, packed_start;
  int64_t count;  // elements of a row that a run has
  bool apart;     // whether each row is a run of its own
};

struct Lists {
  std::vector<Run> runs;
  std::vector<Chunk> chunks;

  // The runs of part number `part`, in chunks of about `longest` elements; runs of neighbours are not longer.
  void add(const ListedRows& listed, int64_t part, int64_t longest);
};

}  // namespace safefreeze
