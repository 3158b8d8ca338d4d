// Divides by every float of 24 bits, by `denominator` of csrc/arithmetic.h, each root whose quotient lies so near a tie
// that it could be rounded wrongly: root * 2^k = divisor * (2 * quotient + 1) + distance, in integers, |distance| <= 8.
// Prints how many, and how many of them differ from the machine's division.
#include <cstdint>
#include <cstdio>

#include "arithmetic.h"

int main() {
  long tried = 0, wrong = 0;
  for (uint32_t divisor = 1u << 23; divisor < 1u << 24; ++divisor) {
    const int twos = __builtin_ctz(divisor);
    if (twos > 3) continue;  // distances are multiples of 2^twos
    uint32_t inverse = 1;    // of the odd part, modulo 2^32
    for (int i = 0; i < 5; ++i) inverse *= 2 - (divisor >> twos) * inverse;
    safefreeze::Scalars s{};
    s.bias2_sqrt = static_cast<float>(divisor) * 0x1p-24f;
    for (int odd = -7; odd <= 7; odd += 2) {
      const int64_t distance = static_cast<int64_t>(odd) * (1 << twos);
      if (distance < -8 || distance > 8) continue;
      for (int k = 24; k <= 25; ++k) {  // quotients of at least 1, and below
        const uint32_t step = 1u << (k - twos);
        const uint32_t residue = static_cast<uint32_t>(-odd) * inverse & (step - 1);
        for (uint64_t tie = ((1u << 24) & ~(step - 1)) | residue; tie < 1u << 25; tie += step) {
          if (tie < 1u << 24) continue;
          const uint64_t root = (static_cast<uint64_t>(divisor) * tie + distance) >> k;
          if (root >> 23 != 1 || (root >= divisor) != (k == 24)) continue;
          const float x = static_cast<float>(root);
          ++tried;
          wrong += safefreeze::denominator(x, s) != x / s.bias2_sqrt;
        }
      }
    }
  }
  std::printf("%ld %ld\n", tried, wrong);
}
