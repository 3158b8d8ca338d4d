// What Python-side tensors look like, read through DLPack's C exchange: data address, shape, dtype, device, in a few
// nanoseconds a tensor, without including the library the tensors belong to. Callers hold the interpreter lock.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <vector>

namespace safefreeze {

// The part we use of DLPack's ABI, major version 1 (dmlc/dlpack, dlpack.h).
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLPackExchange {
  uint32_t major, minor;
  const DLPackExchange* previous;
  void* not_used[3];
  int (*describe)(void* tensor, DLTensor* out);  // -1: Python exception set
  void* current_work_stream;
};

// How to look at the tensors of one library.
struct TensorLibrary {
  PyObject* type;  // what its tensors are instances of
  const DLPackExchange* exchange = nullptr;

  // Throws std::runtime_error if the type offers no exchange we know.
  explicit TensorLibrary(PyObject* tensor_type);

  // False, without an exception, for what is no tensor of this library or cannot be described.
  bool describe(PyObject* object, DLTensor* out) const;
};

// Where the tensors of an optimizer's state lie, and whether they still do.
class Whereabouts {
 public:
  // `state`: dict parameter -> dict with tensors among its values. All tensors are kept alive: no address comes twice.
  Whereabouts(TensorLibrary library, PyObject* state);
  ~Whereabouts();
  Whereabouts(const Whereabouts&) = delete;
  Whereabouts& operator=(const Whereabouts&) = delete;

  // Whether `state` holds the same objects in the same order, and no tensor has moved or changed its strides.
  bool hold(PyObject* state) const;

 private:
  struct Item {
    PyObject* object;  // parameter, its dict, or a key or value of that dict
    const void* data;  // of a tensor, else null
    bool contiguous;
    // Where looking at it will read. After a backward pass that is all cold, and one miss after the other takes longer
    // than a small step, so it is asked for ahead. Only ever prefetched: an address that is out of date costs nothing.
    const char *body, *storage;
  };
  Item look_at(PyObject* object) const;
  // Calls `visit(object)` on each parameter, its dict, keys and values of that dict, and so on until it says false.
  template <typename Visit>
  static bool each(PyObject* state, Visit visit);

  TensorLibrary library_;
  std::vector<Item> items_;  // owned
};

// The gradients of a list of parameters.
class Gradients {
 public:
  // Remembers shape, dtype and device of `params`, a list of tensors; holds no reference to them.
  Gradients(TensorLibrary library, PyObject* params);

  // Puts the gradient of each of `params` into the list `grads`. True: all are there, contiguous, and have the
  // shape, dtype and device that the parameter had; `addresses` then has theirs. False: someone must look closer.
  bool read(PyObject* params, PyObject* grads);

  std::vector<int64_t> addresses;
  std::vector<int32_t> dtypes;  // DType of each parameter

 private:
  struct Look {
    int32_t device_type, device_id, ndim;
  };
  TensorLibrary library_;
  std::vector<Look> looks_;
  std::vector<int64_t> shapes_;
};

// A number for these very tensors (None is left out), in any order, and for how often autograd knows each to have been
// written to. Numbers of two lists add up, modulo 2^64, to that of both.
uint64_t trace(PyObject* tensors);

}  // namespace safefreeze
