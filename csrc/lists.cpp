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

void Lists::add(const ListedRows& listed, int64_t part, int64_t longest) {
  int64_t taken = 0, room = 0;  // elements of the part's runs so far; and when there are more, a chunk begins
  const auto put = [&](Run run) {
    const int64_t most = listed.apart ? run.count : longest;
    while (run.count > 0) {
      const Run piece{run.start, run.packed, run.count < most ? run.count : most, run.age};
      const int64_t number = static_cast<int64_t>(runs.size());
      taken += piece.count;
      if (taken > room) {
        chunks.push_back({part, number, number});
        room = (taken + longest - 1) / longest * longest;
      }
      runs.push_back(piece);
      chunks.back().end = number + 1;
      run = {run.start + piece.count, run.packed + piece.count, run.count - piece.count, run.age};
    }
  };
  Run run{0, 0, 0, 0};
  int64_t next_row = -1, next_place = -1;
  for (int64_t i = 0; i < listed.n_rows; ++i) {
    const int64_t row = listed.rows ? listed.rows[i] : i, place = listed.places ? listed.places[i] : i;
    const int64_t age = listed.ages ? listed.ages[i] : 0;
    if (listed.apart || row != next_row || place != next_place || age != run.age) {
      put(run);
      run = {row * listed.width, listed.packed_start + place * listed.packed_width, 0, age};
    }
    run.count += listed.count;
    next_row = row + 1;
    next_place = place + 1;
  }
  put(run);
}

}  // namespace safefreeze
