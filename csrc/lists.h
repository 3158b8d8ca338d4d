// Work lists, made from parts of kernels/parts.py: the twin of what that file does where there is no extension. Callers
// hold the interpreter lock.
#pragma once

#include <cstdint>
#include <vector>

namespace safefreeze {

// The different ones of `n` numbers, 0 or more and ascending; `which` of them each number is.
std::vector<int64_t> distinct(const int64_t* numbers, int64_t n, int64_t* which);

// What runs are made of: rows of one part. An address of 0 stands for 0, 1, 2, ...
struct ListedRows {
  const int64_t* rows;    // of the tensor
  const int64_t* places;  // rows of its packed twin
  const int64_t* ages;    // which age each has; null: all the first
  int64_t n_rows;         // how many there are
  int64_t width, packed_width, packed_start;
  int64_t count;  // elements of a row that a run has
  bool apart;     // whether each row is a run of its own
};

// Columns of `RunTable` in kernels/parts.py.
struct RunColumns {
  std::vector<int64_t> part, start, packed, count, age;
};

void add_runs(const ListedRows& listed, int64_t part, RunColumns& runs);

}  // namespace safefreeze
