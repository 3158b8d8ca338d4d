#include "audit.h"

#include <cstring>

#include "arithmetic.h"

namespace safefreeze {
namespace {

float as_f32(uint32_t stored) {
  FloatBits x;
  x.bits = stored;
  return x.value;
}
float as_bf16(uint16_t stored) { return from_bf16(stored); }
float as_f16(uint16_t stored) { return from_f16(stored); }
template <typename T>
float unknown(T) {
  return 0.0f;
}

// Elements next to each other, `flags` (may be null) set where frozen. Several running sums, so that they overlap.
template <typename T, float (*number)(T), bool numbers>
void stretch(const T* before, const T* after, int64_t n, const uint8_t* flags, int64_t place, Changes& found) {
  constexpr int lanes = 8;
  double largest[lanes] = {}, sum[lanes] = {}, squares[lanes] = {};
  int64_t frozen = 0, live = 0, strange = 0;
  for (int64_t start = 0; start < n; start += lanes) {
    const int width = n - start < lanes ? static_cast<int>(n - start) : lanes;
    for (int lane = 0; lane < width; ++lane) {
      const int64_t i = start + lane;
      const bool differs = before[i] != after[i], still = flags && flags[i];
      frozen += differs && still;
      live += differs && !still;
      if (!numbers) continue;
      const float apart = number(after[i]) - number(before[i]);
      const bool finite = apart - apart == 0.0f, counts = differs && !still;
      strange += counts && !finite;
      const double change = counts && finite ? (apart < 0 ? -apart : apart) : 0.0;
      largest[lane] = change > largest[lane] ? change : largest[lane];
      sum[lane] += change;
      squares[lane] += change * change;
    }
  }
  for (int lane = 0; lane < lanes; ++lane) {
    found.largest = largest[lane] > found.largest ? largest[lane] : found.largest;
    found.sum += sum[lane];
    found.squares += squares[lane];
  }
  found.live += live;
  found.strange += numbers ? strange : live;
  if (frozen && found.first < 0) {
    for (int64_t i = 0; found.first < 0; ++i) {
      if (flags[i] && before[i] != after[i]) found.first = place + i;
    }
  }
  found.frozen += frozen;
}

template <typename T, float (*number)(T), bool numbers>
void compare_rows(const Versions& v, Changes& found) {
  constexpr int64_t most = 1024;
  uint8_t flags[most];
  const T *before = static_cast<const T*>(v.before), *after = static_cast<const T*>(v.after);
  for (int64_t row = 0; row < v.rows; ++row) {
    const int64_t first = row * v.cols;
    if (std::memcmp(before + first, after + first, static_cast<size_t>(v.cols) * sizeof(T)) == 0) continue;
    const bool whole = v.frozen_rows && v.frozen_rows[row];
    for (int64_t col = 0; col < v.cols; col += most) {
      const int64_t n = v.cols - col < most ? v.cols - col : most, place = first + col;
      const uint8_t* chosen = nullptr;
      if (whole) {
        std::memset(flags, 1, static_cast<size_t>(n));
        chosen = flags;
      } else if (v.frozen_bits) {
        for (int64_t i = 0; i < n; ++i) {
          flags[i] =
              (v.frozen_bits[(place + i) / 8] >> ((place + i) % 8) & 1) | (v.frozen_cols ? v.frozen_cols[col + i] : 0);
        }
        chosen = flags;
      } else if (v.frozen_cols) {
        chosen = v.frozen_cols + col;
      }
      stretch<T, number, numbers>(before + place, after + place, n, chosen, place, found);
    }
  }
}

}  // namespace

void compare(const Versions& versions, Value value, Changes& found) {
  switch (value) {
    case Value::f32:
      return compare_rows<uint32_t, as_f32, true>(versions, found);
    case Value::bf16:
      return compare_rows<uint16_t, as_bf16, true>(versions, found);
    case Value::f16:
      return compare_rows<uint16_t, as_f16, true>(versions, found);
    case Value::bytes1:
      return compare_rows<uint8_t, unknown<uint8_t>, false>(versions, found);
    case Value::bytes2:
      return compare_rows<uint16_t, unknown<uint16_t>, false>(versions, found);
    case Value::bytes4:
      return compare_rows<uint32_t, unknown<uint32_t>, false>(versions, found);
    case Value::bytes8:
      return compare_rows<uint64_t, unknown<uint64_t>, false>(versions, found);
  }
}

}  // namespace safefreeze
