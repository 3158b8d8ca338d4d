// Stands in for CUDA's header so that csrc/cuda.cu can be compiled and run on the host: a launch runs its grid block by
// block, and the threads of a block take turns, each running up to its next barrier. Device memory is host memory.
// Between two barriers threads run in order, in reverse, or in an order drawn from a seed; shared memory of a block
// begins as bytes that are not zero. Or launches are handed to a function, which runs them.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

#define CUDART_VERSION 13000

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
inline dim3 threadIdx, blockIdx, gridDim;

// How launches are run. `order`: of threads; 0 as they are numbered, -1 in reverse, else a seed. `launcher`: who is
// handed the address of a kernel, blocks, threads of a block, and addresses and sizes of parameters, instead. `shared`:
// where the variables in shared memory are.
struct Launching {
  int order = 0;
  std::vector<std::pair<char*, size_t>> shared;
  std::function<void(const void*, unsigned, unsigned, const std::vector<std::pair<const void*, size_t>>&)> launcher;
  static Launching& now() {
    static Launching& launching = *new Launching;  // outlives Python's objects
    return launching;
  }
};

inline double __hiloint2double(int high, int low) {
  const uint64_t bits = static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low);
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline void* __cvta_global_to_generic(size_t address) { return reinterpret_cast<void*>(address); }

// The threads of a block.
class Fibers {
 public:
  static Fibers& of_block() {
    static Fibers fibers;
    return fibers;
  }

  void run(unsigned n, const std::function<void()>& thread) {
    thread_ = &thread;
    for (const auto& [at, size] : Launching::now().shared) std::memset(at, 0xa5, size);
    std::vector<unsigned> order(n);
    std::iota(order.begin(), order.end(), 0u);
    if (Launching::now().order < 0) std::reverse(order.begin(), order.end());
    stacks_.resize(n);
    states_.assign(n, State::running);
    contexts_.resize(n);
    for (unsigned i = 0; i < n; ++i) {
      if (!stacks_[i]) stacks_[i].reset(new char[stack_size]);
      getcontext(&contexts_[i]);
      contexts_[i].uc_stack.ss_sp = stacks_[i].get();
      contexts_[i].uc_stack.ss_size = stack_size;
      contexts_[i].uc_link = &main_;
      makecontext(&contexts_[i], &Fibers::enter, 0);
    }
    for (bool left = true; left;) {
      left = false;
      bool waited = false, finished = false;
      if (Launching::now().order > 0) std::shuffle(order.begin(), order.end(), random_);
      for (unsigned one : order) {
        current_ = one;
        if (states_[current_] == State::finished) continue;
        threadIdx = dim3(current_);
        swapcontext(&main_, &contexts_[current_]);
        (states_[current_] == State::finished ? finished : waited) = true;
      }
      left = waited;
      if (waited && finished) throw std::logic_error("some threads of a block ended while others wait at a barrier");
    }
  }

  void wait() { swapcontext(&contexts_[current_], &main_); }

 private:
  enum class State { running, finished };
  static constexpr size_t stack_size = 64 * 1024;

  static void enter() {
    Fibers& fibers = of_block();
    (*fibers.thread_)();
    fibers.states_[fibers.current_] = State::finished;
  }

  const std::function<void()>* thread_ = nullptr;
  std::mt19937 random_{static_cast<unsigned>(Launching::now().order)};
  ucontext_t main_;
  unsigned current_ = 0;
  std::vector<ucontext_t> contexts_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  std::vector<State> states_;
};

inline void __syncthreads() { Fibers::of_block().wait(); }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
struct cudaFuncAttributes {};

inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               std::common_type_t<Parameters>... arguments) {
  if (Launching::now().launcher) {
    std::vector<std::pair<const void*, size_t>> parameters{{&arguments, sizeof(arguments)}...};
    Launching::now().launcher(reinterpret_cast<const void*>(kernel), config->gridDim.x, config->blockDim.x, parameters);
    return cudaSuccess;
  }
  gridDim = config->gridDim;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    Fibers::of_block().run(config->blockDim.x, [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}
