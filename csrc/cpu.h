// The CPU kernels of one instruction set, a chunk at a time, and the threads that take chunks.
#pragma once

#include "audit.h"
#include "work.h"

// Names of what is compiled once per instruction set.
#define SAFEFREEZE_JOIN_(a, b) a##b
#define SAFEFREEZE_JOIN(a, b) SAFEFREEZE_JOIN_(a, b)
#define SAFEFREEZE_TEXT_(a) #a
#define SAFEFREEZE_TEXT(a) SAFEFREEZE_TEXT_(a)

namespace safefreeze {

struct CpuKernels {
  const char* name;
  void (*adamw)(const AdamWLaunch&, int64_t chunk);
  void (*norm)(const NormLaunch&, int64_t chunk);
  void (*scale)(const ScaleLaunch&, int64_t chunk);
  void (*zero)(const ZeroLaunch&, int64_t chunk);
  void (*copy)(const CopyLaunch&, int64_t chunk);
  int64_t (*count_clear)(const uint8_t* bits, int64_t start, int64_t end);
  void (*repack)(const RepackLaunch&, int64_t chunk);
  void (*turn)(const TurnLaunch&, int64_t chunk);
  Compare* compare;  // csrc/audit.cpp
};

#if defined(SAFEFREEZE_ISA)
// csrc/moves.cpp
void SAFEFREEZE_JOIN(zero_, SAFEFREEZE_ISA)(const ZeroLaunch&, int64_t chunk);
void SAFEFREEZE_JOIN(copy_, SAFEFREEZE_ISA)(const CopyLaunch&, int64_t chunk);
int64_t SAFEFREEZE_JOIN(count_clear_, SAFEFREEZE_ISA)(const uint8_t* bits, int64_t start, int64_t end);
void SAFEFREEZE_JOIN(repack_, SAFEFREEZE_ISA)(const RepackLaunch&, int64_t chunk);
void SAFEFREEZE_JOIN(turn_, SAFEFREEZE_ISA)(const TurnLaunch&, int64_t chunk);
#endif

extern const CpuKernels cpu_kernels_baseline;
#if defined(SAFEFREEZE_X86)
extern const CpuKernels cpu_kernels_avx2;
extern const CpuKernels cpu_kernels_avx512;
#endif

// Borrow the OpenMP team of a runtime that is already loaded (torch's), so that the process keeps one set of
// threads; false if `path` is not loaded or has no team to lend. Without one, threads are made per call.
bool borrow_openmp(const char* path);

// Call `take(context, chunk)` once for every chunk below n_chunks, from up to `threads` threads. Every thread
// begins with its own stretch and then helps others, so one busy core does not hold up the step.
void for_each_chunk(int64_t n_chunks, int threads, void (*take)(void* context, int64_t chunk), void* context);

}  // namespace safefreeze
