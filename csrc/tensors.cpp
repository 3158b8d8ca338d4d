#include "tensors.h"

#include <stdexcept>
#include <string>

#include "work.h"

namespace safefreeze {
namespace {

const void* data_of(const DLTensor& tensor) { return static_cast<const char*>(tensor.data) + tensor.byte_offset; }

// Row-major without gaps, as torch.Tensor.is_contiguous has it: strides of dimensions of size 1 do not count.
bool is_contiguous(const DLTensor& tensor) {
  if (tensor.strides == nullptr) return true;
  int64_t expected = 1;
  bool dense = true;
  for (int32_t d = tensor.ndim - 1; d >= 0; --d) {
    const int64_t size = tensor.shape[d];
    if (size == 0) return true;
    if (size != 1) {
      dense = dense && tensor.strides[d] == expected;
      expected *= size;
    }
  }
  return dense;
}

constexpr size_t ahead = 6;  // items prefetched before they are looked at

void prefetch(const char* address, int lines) {
#if defined(__GNUC__)
  for (int line = 0; address != nullptr && line < lines; ++line) __builtin_prefetch(address + 64 * line);
#endif
}

// DType, or -1 for what kernels do not take. DLPack's codes: 2 float, 4 bfloat.
int32_t dtype_of(const DLTensor& tensor) {
  if (tensor.dtype_code == 2 && tensor.dtype_bits == 32) return static_cast<int32_t>(DType::f32);
  if (tensor.dtype_code == 4 && tensor.dtype_bits == 16) return static_cast<int32_t>(DType::bf16);
  if (tensor.dtype_code == 2 && tensor.dtype_bits == 16) return static_cast<int32_t>(DType::f16);
  return -1;
}

// The address behind a tensor or storage, as its `_cdata` tells it; null if it does not.
const char* body_of(PyObject* object) {
  PyObject* address = PyObject_GetAttrString(object, "_cdata");
  const void* body = address != nullptr ? PyLong_AsVoidPtr(address) : nullptr;
  Py_XDECREF(address);
  PyErr_Clear();
  return static_cast<const char*>(body);
}

void expect_list(PyObject* object, const char* what) {
  if (!PyList_Check(object)) throw std::invalid_argument(std::string(what) + " must be a list");
}

}  // namespace

TensorLibrary::TensorLibrary(PyObject* tensor_type) : type(tensor_type) {
  PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
  if (capsule != nullptr) {
    exchange = static_cast<const DLPackExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  while (exchange != nullptr && exchange->major != 1) exchange = exchange->previous;
  if (exchange == nullptr || exchange->describe == nullptr) {
    throw std::runtime_error("the tensor library has no DLPack exchange of major version 1");
  }
}

bool TensorLibrary::describe(PyObject* object, DLTensor* out) const {
  if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(type))) return false;
  if (exchange->describe(object, out) == 0) return true;
  PyErr_Clear();
  return false;
}

Whereabouts::Whereabouts(TensorLibrary library, PyObject* state) : library_(library) {
  each(state, [&](PyObject* object) {
    items_.push_back(look_at(object));
    return true;
  });
  for (Item& item : items_) {
    Py_INCREF(item.object);
    if (PyDict_Check(item.object))
      item.body = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(item.object)->ma_keys);
    if (item.data == nullptr) continue;
    item.body = body_of(item.object);
    if (PyObject* storage = PyObject_CallMethod(item.object, "untyped_storage", nullptr)) {
      item.storage = body_of(storage);
      Py_DECREF(storage);
    }
    PyErr_Clear();
  }
}

Whereabouts::~Whereabouts() {
  for (const Item& item : items_) Py_DECREF(item.object);
}

Whereabouts::Item Whereabouts::look_at(PyObject* object) const {
  DLTensor look;
  if (!library_.describe(object, &look)) return {object, nullptr, false, nullptr, nullptr};
  return {object, data_of(look), is_contiguous(look), nullptr, nullptr};
}

template <typename Visit>
bool Whereabouts::each(PyObject* state, Visit visit) {
  if (!PyDict_Check(state)) return false;
  PyObject *param, *entries, *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &param, &entries);) {
    if (!visit(param) || !visit(entries) || !PyDict_Check(entries)) return false;
    for (Py_ssize_t inner = 0; PyDict_Next(entries, &inner, &key, &value);) {
      if (!visit(key) || !visit(value)) return false;
    }
  }
  return true;
}

bool Whereabouts::hold(PyObject* state) const {
  size_t next = 0;
  const bool same = each(state, [&](PyObject* object) {
    if (next == items_.size() || object != items_[next].object) return false;
    if (next + ahead < items_.size()) {
      const Item& later = items_[next + ahead];
      prefetch(reinterpret_cast<const char*>(later.object), 1);
      prefetch(later.body, 4);
      prefetch(later.storage, 2);
    }
    const Item now = look_at(object), &then = items_[next++];
    return now.data == then.data && now.contiguous == then.contiguous;
  });
  return same && next == items_.size();
}

Gradients::Gradients(TensorLibrary library, PyObject* params) : library_(library) {
  expect_list(params, "params");
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
    DLTensor look;
    if (!library_.describe(PyList_GET_ITEM(params, i), &look)) look = {};
    looks_.push_back({look.device_type, look.device_id, look.ndim});
    dtypes.push_back(dtype_of(look));  // -1 where there was nothing to look at: never plain
    shapes_.insert(shapes_.end(), look.shape, look.shape + look.ndim);
  }
  addresses.resize(looks_.size());
}

bool Gradients::read(PyObject* params, PyObject* grads) {
  static PyObject* const grad = PyUnicode_InternFromString("grad");
  expect_list(params, "params");
  expect_list(grads, "grads");
  const Py_ssize_t n = static_cast<Py_ssize_t>(looks_.size());
  if (PyList_GET_SIZE(params) != n || PyList_GET_SIZE(grads) != n) throw std::invalid_argument("lists of other length");
  bool plain = true;
  const int64_t* shape = shapes_.data();
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* value = PyObject_GetAttr(PyList_GET_ITEM(params, i), grad);
    if (value == nullptr) {
      PyErr_Clear();
      throw std::invalid_argument("params must be tensors");
    }
    PyList_SetItem(grads, i, value);  // takes the reference
    const Look& expected = looks_[i];
    DLTensor look;
    // a subclass may hold its values elsewhere
    plain = plain && reinterpret_cast<PyObject*>(Py_TYPE(value)) == library_.type && library_.describe(value, &look);
    if (plain) {
      plain = look.device_type == expected.device_type && look.device_id == expected.device_id &&
              look.ndim == expected.ndim && dtypes[i] >= 0 && dtype_of(look) == dtypes[i] && is_contiguous(look);
      for (int32_t d = 0; plain && d < look.ndim; ++d) plain = look.shape[d] == shape[d];
      addresses[i] = static_cast<int64_t>(reinterpret_cast<intptr_t>(data_of(look)));
    }
    shape += expected.ndim;
  }
  return plain;
}

uint64_t trace(PyObject* tensors) {
  static PyObject* const version = PyUnicode_InternFromString("_version");
  expect_list(tensors, "tensors");
  uint64_t sum = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) {
    PyObject* tensor = PyList_GET_ITEM(tensors, i);
    if (tensor == Py_None) continue;
    PyObject* count = PyObject_GetAttr(tensor, version);
    const long long writes =
        count != nullptr ? PyLong_AsLongLong(count) : 0;  // of inference tensors nobody counts them
    Py_XDECREF(count);
    PyErr_Clear();
    // the finaliser of SplitMix64 (Steele, Lea and Flood 2014), so that sums of such words tell tensors apart
    uint64_t word = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(tensor)) * 0x9e3779b97f4a7c15u +
                    static_cast<uint64_t>(writes);
    word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9u;
    word = (word ^ (word >> 27)) * 0x94d049bb133111ebu;
    sum += word ^ (word >> 31);
  }
  return sum;
}

}  // namespace safefreeze
