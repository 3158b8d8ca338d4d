// csrc/cuda.cu, run on the host, as a Python module.
#include "../../../csrc/bindings.h"

PYBIND11_MODULE(cuda_on_host, module) { safefreeze::bind_cuda(module); }
