// Compiled once per instruction set, as cpu.cpp is.
#include <string.h>

#include "arithmetic.h"
#include "cpu.h"

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

// Elements next to each other, `flags` (may be null) set where frozen: exactly, one at a time.
template <typename T, float (*number)(T), bool numbers>
void stretch(const T* before, const T* after, int64_t n, const uint8_t* flags, int64_t place, Changes& found) {
  for (int64_t i = 0; i < n; ++i) {
    if (before[i] == after[i]) continue;
    if (flags && flags[i]) {
      if (found.first < 0) found.first = place + i;
      ++found.frozen;
      continue;
    }
    ++found.live;
    const double apart = numbers ? static_cast<double>(number(after[i]) - number(before[i])) : 0.0;
    if (!numbers || !(apart - apart == 0.0)) {
      ++found.strange;
      continue;
    }
    const double change = apart < 0 ? -apart : apart;
    found.largest = change > found.largest ? change : found.largest;
    found.sum += change;
    found.squares += change * change;
  }
}

// The same for numbers, in lanes and in float32 over a few elements at a time. What float32 cannot hold, and whatever
// holds a frozen change, is left to `stretch`.
template <typename T, float (*number)(T), bool flagged>
void quick_stretch(const T* before, const T* after, int64_t n, const uint8_t* flags, int64_t place, Changes& found) {
  constexpr int lanes = 16;
  constexpr int64_t few = 256;
  for (int64_t start = 0; start < n; start += few) {
    const int64_t count = n - start < few ? n - start : few, whole = count / lanes * lanes;
    const T *old = before + start, *now = after + start;
    const uint8_t* const still = flagged ? flags + start : nullptr;
    float largest[lanes] = {}, sum[lanes] = {}, squares[lanes] = {};
    T live[lanes] = {}, frozen[lanes] = {};
    T frees[few];  // as wide as what it is for, or lanes would not fit
    for (int64_t i = 0; flagged && i < count; ++i) frees[i] = still[i] == 0;
    for (int64_t i = 0; i < whole; i += lanes) {
      for (int lane = 0; lane < lanes; ++lane) {
        const T differs = now[i + lane] != old[i + lane], free = flagged ? frees[i + lane] : 1;
        FloatBits apart;
        apart.value = number(now[i + lane]) - number(old[i + lane]);
        apart.bits &= 0x7fffffffu & (0u - static_cast<uint32_t>(free));  // nothing where frozen, else without its sign
        const float change = apart.value;
        largest[lane] = change > largest[lane] ? change : largest[lane];
        sum[lane] += change;
        squares[lane] += change * change;
        live[lane] = static_cast<T>(live[lane] + (differs & free));
        if (flagged) frozen[lane] = static_cast<T>(frozen[lane] + (differs & (free ^ 1)));
      }
    }
    double top = 0, total = 0, square = 0;
    int64_t moved = 0, drifted = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      top = largest[lane] > top ? static_cast<double>(largest[lane]) : top;
      total += static_cast<double>(sum[lane]);
      square += static_cast<double>(squares[lane]);
      moved += live[lane];
      drifted += frozen[lane];
    }
    // too large, not finite, or small enough for squares to have been lost
    if (drifted || !(square < 1e30) || !(total < 1e30) || (square < 1e-25 && moved)) {
      stretch<T, number, true>(old, now, whole, still, place + start, found);
    } else {
      found.largest = top > found.largest ? top : found.largest;
      found.sum += total;
      found.squares += square;
      found.live += moved;
    }
    stretch<T, number, true>(old + whole, now + whole, count - whole, flagged ? still + whole : nullptr,
                             place + start + whole, found);
  }
}

template <typename T, float (*number)(T), bool numbers>
void compare_rows(const Versions& v, Changes& found) {
  constexpr int64_t most = 1024;
  uint8_t flags[most];
  const T *before = static_cast<const T*>(v.before), *after = static_cast<const T*>(v.after);
  for (int64_t row = 0; row < v.rows; ++row) {
    const int64_t first = row * v.cols;
    if (memcmp(before + first, after + first, static_cast<size_t>(v.cols) * sizeof(T)) == 0) continue;
    const bool whole = v.frozen_rows && v.frozen_rows[row];
    for (int64_t col = 0; col < v.cols; col += most) {
      const int64_t n = v.cols - col < most ? v.cols - col : most, place = first + col;
      const uint8_t* chosen = nullptr;
      if (whole) {
        memset(flags, 1, static_cast<size_t>(n));
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
      if (!numbers || whole) {
        stretch<T, number, numbers>(before + place, after + place, n, chosen, place, found);
      } else if (chosen) {
        quick_stretch<T, number, true>(before + place, after + place, n, chosen, place, found);
      } else {
        quick_stretch<T, number, false>(before + place, after + place, n, nullptr, place, found);
      }
    }
  }
}

}  // namespace

void SAFEFREEZE_JOIN(compare_, SAFEFREEZE_ISA)(const Versions& versions, Value value, Changes& found) {
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
