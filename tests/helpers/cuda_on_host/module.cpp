// csrc/cuda.cu, run on the host, as a Python module.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <pybind11/stl.h>

#include "../../../csrc/bindings.h"

namespace py = pybind11;

// Where this library begins in memory.
static char* base() {
  Dl_info library;
  dladdr(reinterpret_cast<const void*>(&base), &library);
  return static_cast<char*>(library.dli_fbase);
}

// `launcher(kernel, blocks, threads, parameters)`: the kernel by its place in this library, parameters as bytes. None:
// launches are run here.
static void set_launcher(py::object launcher) {
  if (launcher.is_none()) {
    Launching::now().launcher = nullptr;
    return;
  }
  Launching::now().launcher = [launcher](const void* kernel, unsigned blocks, unsigned threads, const auto& parameters) {
    py::list contents;
    for (const auto& [at, size] : parameters) contents.append(py::bytes(static_cast<const char*>(at), size));
    launcher(static_cast<const char*>(kernel) - base(), blocks, threads, contents);
  };
}

PYBIND11_MODULE(cuda_on_host, module) {
  safefreeze::bind_cuda(module);
  module.def("set_launcher", &set_launcher);
  module.def("set_order", [](int order) { Launching::now().order = order; });
  module.def("set_shared", [](const std::vector<std::pair<size_t, size_t>>& places) {
    for (const auto& [at, size] : places) Launching::now().shared.emplace_back(base() + at, size);
  });
}
