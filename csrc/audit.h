// Two versions of a window of a weight compared: did frozen elements change, and how much did live ones?
#pragma once

#include <cstdint>

namespace safefreeze {

enum class Value : int32_t { f32 = 0, bf16 = 1, f16 = 2, bytes1 = 3, bytes2 = 4, bytes4 = 5, bytes8 = 6 };

// Whole rows of a matrix. Flags are one byte per row or column, set where it is frozen; `bits`, one per element of the
// window, are readable 8 bytes past their end. Null: nothing of that kind is frozen.
struct Versions {
  const void *before, *after;
  int64_t rows, cols;
  const uint8_t *frozen_rows, *frozen_cols, *frozen_bits;
};

// What was found, added to what is there. Elements differ if their bytes do. Changes are |after - before|; what is no
// finite number, or not known as a number (Value::bytes*), is counted alone.
struct Changes {
  int64_t frozen = 0;             // frozen elements that differ
  int64_t first = -1;             // the first of them, counted from the window's first element
  int64_t live = 0, strange = 0;  // live elements that differ, and those whose change is no finite number
  double largest = 0, sum = 0, squares = 0;
};

using Compare = void(const Versions& versions, Value value, Changes& found);

Compare compare_baseline;
#if defined(SAFEFREEZE_X86)
Compare compare_avx2, compare_avx512;
#endif

}  // namespace safefreeze
