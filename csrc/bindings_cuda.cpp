// pybind11 over cuda.h: takes addresses as integers, checks nothing twice (Python has checked them all).
#include "bindings.h"
#include "cuda.h"

namespace py = pybind11;

namespace safefreeze {
namespace {

using cuda::Queue;

// A queue and the tiles of one launch.
struct Launch {
  Queue queue;
  Tiles work;
  Launch(int device, uintptr_t stream, uintptr_t tiles, int64_t n_tiles, uintptr_t parts, bool frozen)
      : queue{device, at<void>(stream)}, work{at<const Tile>(tiles), at<const TilePart>(parts), n_tiles, frozen} {}
};

void launch_upload(int device, uintptr_t stream, const py::bytes& from, uintptr_t to) {
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(from.ptr(), &data, &size) != 0) throw py::error_already_set();
  cuda::upload({device, at<void>(stream)}, data, static_cast<size_t>(size), at<void>(to));
}

void launch_adamw(const Launch& launch, uintptr_t tensors, uintptr_t grads, uintptr_t scalar_set, uintptr_t scalars,
                  uintptr_t skip, uintptr_t multiplier, int param, int state, int rounding, bool l2, bool amsgrad,
                  uint64_t seed) {
  cuda::adamw(launch.queue,
              {launch.work, at<const AdamWTensor>(tensors), at<const DenseTensor>(grads), at<const int32_t>(scalar_set),
               at<const Scalars>(scalars), at<const float>(skip), at<const float>(multiplier), seed, l2},
              static_cast<DType>(param), static_cast<DType>(state), static_cast<cuda::Rounding>(rounding), amsgrad);
}

void launch_norm(const Launch& launch, uintptr_t tensors, int dtype, int kind, uintptr_t partial) {
  cuda::norm(launch.queue, launch.work, at<const DenseTensor>(tensors), static_cast<DType>(dtype),
             static_cast<NormKind>(kind), at<double>(partial));
}

void launch_total(int device, uintptr_t stream, uintptr_t partial, int64_t n, int kind, uintptr_t result) {
  cuda::total({device, at<void>(stream)}, at<const double>(partial), n, static_cast<NormKind>(kind),
              at<double>(result));
}

void launch_scale(const Launch& launch, uintptr_t tensors, int dtype, uintptr_t factor) {
  cuda::scale(launch.queue, launch.work, at<const DenseTensor>(tensors), static_cast<DType>(dtype),
              at<const float>(factor));
}

void launch_zero(const Launch& launch, uintptr_t tensors, int dtype) {
  cuda::zero(launch.queue, launch.work, at<const DenseTensor>(tensors), static_cast<DType>(dtype));
}

void launch_copy(const Launch& launch, uintptr_t tensors, int dtype, bool gather) {
  cuda::copy(launch.queue, launch.work, at<const PackedTensor>(tensors), static_cast<DType>(dtype), gather);
}

}  // namespace

void bind_cuda(py::module_ module) {
  py::class_<Launch>(module, "Launch")
      .def(py::init<int, uintptr_t, uintptr_t, int64_t, uintptr_t, bool>(), py::arg("device"), py::arg("stream"),
           py::arg("tiles"), py::arg("n_tiles"), py::arg("parts"), py::arg("frozen"));
  module.def("upload", &launch_upload);
  module.def("adamw", &launch_adamw);
  module.def("norm", &launch_norm);
  module.def("norm_blocks", &cuda::norm_blocks);
  module.def("total", &launch_total);
  module.def("scale", &launch_scale);
  module.def("zero", &launch_zero);
  module.def("copy", &launch_copy);
  module.def("runtime_version", &cuda::runtime_version);
  module.def("driver_version", &cuda::driver_version);
  module.def("refusal", &cuda::refusal);
  module.attr("TILE_ELEMENTS") = tile_elements;
  module.attr("STRUCT_SIZES") =
      py::dict(py::arg("Tile") = sizeof(Tile), py::arg("TilePart") = sizeof(TilePart),
               py::arg("AdamWTensor") = sizeof(AdamWTensor), py::arg("Scalars") = sizeof(Scalars));
}

}  // namespace safefreeze
