#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "cpu.h"

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace safefreeze {
namespace {

// The entry point every GNU-compatible OpenMP runtime exports: run `body(data)` on a team of `threads`.
using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
GompParallel openmp_parallel = nullptr;

constexpr int most_threads = 256;

struct alignas(64) Stretch {
  std::atomic<int64_t> next;
  int64_t end;
};

struct Region {
  void (*take)(void*, int64_t);
  void* context;
  int threads;
  std::atomic<int> arrived{0};
  Stretch stretches[most_threads];
};

void work_in(void* data) {
  Region& region = *static_cast<Region*>(data);
  const int me = region.arrived.fetch_add(1, std::memory_order_relaxed);
  for (int turn = 0; turn < region.threads; ++turn) {
    Stretch& stretch = region.stretches[(me + turn) % region.threads];
    while (true) {
      const int64_t chunk = stretch.next.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= stretch.end) break;
      region.take(region.context, chunk);
    }
  }
}

}  // namespace

bool borrow_openmp(const char* path) {
  // ThreadSanitizer knows how std::thread orders memory, and nothing of an OpenMP runtime built without it.
#if !defined(_WIN32) && !defined(__SANITIZE_THREAD__)
  if (void* library = dlopen(path, RTLD_NOW | RTLD_NOLOAD)) {
    if (auto parallel = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"))) {
      openmp_parallel = parallel;  // the handle stays open: the runtime must outlive us
      return true;
    }
    dlclose(library);
  }
#endif
  return false;
}

void for_each_chunk(int64_t n_chunks, int threads, void (*take)(void*, int64_t), void* context) {
  threads = static_cast<int>(std::min<int64_t>({threads, n_chunks, most_threads}));
  if (threads <= 1) {
    for (int64_t chunk = 0; chunk < n_chunks; ++chunk) take(context, chunk);
    return;
  }
  Region region;
  region.take = take;
  region.context = context;
  region.threads = threads;
  for (int t = 0; t < threads; ++t) {
    region.stretches[t].next.store(n_chunks * t / threads, std::memory_order_relaxed);
    region.stretches[t].end = n_chunks * (t + 1) / threads;
  }
  if (openmp_parallel) {
    openmp_parallel(work_in, &region, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> team;
  for (int t = 1; t < threads; ++t) team.emplace_back(work_in, &region);
  work_in(&region);
  for (std::thread& member : team) member.join();
}

}  // namespace safefreeze
