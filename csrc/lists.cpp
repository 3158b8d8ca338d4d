#include "lists.h"

#include <algorithm>

namespace safefreeze {

std::vector<int64_t> distinct(const int64_t* numbers, int64_t n, int64_t* which) {
  std::vector<int64_t> found;
  if (n == 0) return found;
  const auto [low, high] = std::minmax_element(numbers, numbers + n);
  const int64_t first = *low, span = *high - first + 1;
  if (span > 8 * n + 4096) {  // counting would take more memory than sorting
    found.assign(numbers, numbers + n);
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    for (int64_t i = 0; i < n; ++i) {
      which[i] = std::lower_bound(found.begin(), found.end(), numbers[i]) - found.begin();
    }
    return found;
  }
  std::vector<int32_t> place(static_cast<size_t>(span), -1);
  for (int64_t i = 0; i < n; ++i) place[static_cast<size_t>(numbers[i] - first)] = 0;
  for (int64_t value = 0; value < span; ++value) {
    if (place[static_cast<size_t>(value)] < 0) continue;
    place[static_cast<size_t>(value)] = static_cast<int32_t>(found.size());
    found.push_back(first + value);
  }
  for (int64_t i = 0; i < n; ++i) which[i] = place[static_cast<size_t>(numbers[i] - first)];
  return found;
}

void add_runs(const ListedRows& listed, int64_t part, RunColumns& runs) {
  int64_t next_row = -1, next_place = -1, last_age = -1;
  for (int64_t i = 0; i < listed.n_rows; ++i) {
    const int64_t row = listed.rows ? listed.rows[i] : i, place = listed.places ? listed.places[i] : i;
    const int64_t age = listed.ages ? listed.ages[i] : 0;
    if (!listed.apart && row == next_row && place == next_place && age == last_age) {
      runs.count.back() += listed.count;
    } else {
      runs.part.push_back(part);
      runs.start.push_back(row * listed.width);
      runs.packed.push_back(listed.packed_start + place * listed.packed_width);
      runs.count.push_back(listed.count);
      runs.age.push_back(age);
    }
    next_row = row + 1;
    next_place = place + 1;
    last_age = age;
  }
}

}  // namespace safefreeze
