// What the modules of the extension share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace safefreeze {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Defines what is in cuda.h as functions of `module`.
void bind_cuda(pybind11::module_ module);

}  // namespace safefreeze
