// pybind11 over the launches: takes addresses as integers, checks nothing twice (Python has checked them all).
#include "bindings.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu.h"
#include "lists.h"
#include "tensors.h"

namespace py = pybind11;
using namespace safefreeze;

namespace {

std::vector<const CpuKernels*> runnable_kernels() {
  std::vector<const CpuKernels*> found;
#if defined(SAFEFREEZE_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(&cpu_kernels_avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&cpu_kernels_avx2);
#endif
  found.push_back(&cpu_kernels_baseline);
  return found;
}

const CpuKernels* kernels = runnable_kernels().front();

void choose_isa(const std::string& name) {
  for (const CpuKernels* candidate : runnable_kernels()) {
    if (name == candidate->name) {
      kernels = candidate;
      return;
    }
  }
  throw std::invalid_argument("choose_isa: '" + name + "' does not run on this processor");
}

py::tuple runnable_isas() {
  py::list names;
  for (const CpuKernels* candidate : runnable_kernels()) names.append(candidate->name);
  return py::tuple(names);
}

// One parallel region over all chunks, without the interpreter lock.
template <typename Launch>
void run(const Launch& launch, int64_t n_chunks, int threads, void (*chunk)(const Launch&, int64_t)) {
  struct Call {
    const Launch& launch;
    void (*chunk)(const Launch&, int64_t);
  } call{launch, chunk};
  py::gil_scoped_release unlocked;
  for_each_chunk(
      n_chunks, threads,
      [](void* context, int64_t index) {
        const Call& c = *static_cast<Call*>(context);
        c.chunk(c.launch, index);
      },
      &call);
}

void launch_adamw(const Runs& work, uintptr_t tensors, uintptr_t grads, uintptr_t param_dtype, uintptr_t state_dtype,
                  uintptr_t scalar_set, uintptr_t scalars, bool l2, bool amsgrad, bool stochastic, uint64_t seed,
                  int threads) {
  run<AdamWLaunch>({work, at<const AdamWTensor>(tensors), at<const DenseTensor>(grads), at<const int32_t>(param_dtype),
                    at<const int32_t>(state_dtype), at<const int32_t>(scalar_set), at<const Scalars>(scalars), l2,
                    amsgrad, stochastic, seed},
                   work.n_chunks, threads, kernels->adamw);
}

void launch_norm(const Runs& work, uintptr_t tensors, uintptr_t dtype, int kind, uintptr_t partial, int threads) {
  run<NormLaunch>({work, at<const DenseTensor>(tensors), at<const int32_t>(dtype), static_cast<NormKind>(kind),
                   at<double>(partial)},
                  work.n_chunks, threads, kernels->norm);
}

void launch_scale(const Runs& work, uintptr_t tensors, uintptr_t dtype, float factor, int threads) {
  run<ScaleLaunch>({work, at<const DenseTensor>(tensors), at<const int32_t>(dtype), factor}, work.n_chunks, threads,
                   kernels->scale);
}

void launch_zero(const Runs& work, uintptr_t tensors, uintptr_t dtype, int threads) {
  run<ZeroLaunch>({work, at<const DenseTensor>(tensors), at<const int32_t>(dtype)}, work.n_chunks, threads,
                  kernels->zero);
}

void launch_copy(const Runs& work, uintptr_t tensors, uintptr_t dtype, bool gather, int threads) {
  run<CopyLaunch>({work, at<const PackedTensor>(tensors), at<const int32_t>(dtype), gather}, work.n_chunks, threads,
                  kernels->copy);
}

// Where what is clear in `bits` is held: per chunk, and of the end.
std::vector<int64_t> places_of(const uint8_t* bits, int64_t numel) {
  std::vector<int64_t> places{0};
  for (int64_t start = 0; start < numel; start += bits_chunk) {
    places.push_back(places.back() + kernels->count_clear(bits, start, std::min(start + bits_chunk, numel)));
  }
  return places;
}

void launch_repack(uintptr_t old_bits, uintptr_t new_bits, int64_t numel, uintptr_t from, uintptr_t to, int64_t width,
                   int threads) {
  const uint8_t *was = at<const uint8_t>(old_bits), *now = at<const uint8_t>(new_bits);
  const std::vector<int64_t> from_at = places_of(was, numel), to_at = places_of(now, numel);
  run<RepackLaunch>({was, now, from_at.data(), to_at.data(), numel, at<const void>(from), at<void>(to), width},
                    (numel + bits_chunk - 1) / bits_chunk, threads, kernels->repack);
}

void launch_turn(uintptr_t old_bits, uintptr_t new_bits, int64_t numel, uintptr_t ages, uintptr_t turned, int64_t width,
                 int64_t turned_width, uintptr_t becomes, uintptr_t seen, int64_t n_ages, int threads) {
  run<TurnLaunch>({at<const uint8_t>(old_bits), at<const uint8_t>(new_bits), numel, at<const void>(ages),
                   at<void>(turned), width, turned_width, at<const uint32_t>(becomes), at<uint8_t>(seen), n_ages},
                  (numel + bits_chunk - 1) / bits_chunk, threads, kernels->turn);
}

py::tuple compare_versions(uintptr_t before, uintptr_t after, int64_t rows, int64_t cols, int value,
                           uintptr_t frozen_rows, uintptr_t frozen_cols, uintptr_t frozen_bits) {
  Changes found;
  {
    py::gil_scoped_release unlocked;
    kernels->compare({at<const void>(before), at<const void>(after), rows, cols, at<const uint8_t>(frozen_rows),
                      at<const uint8_t>(frozen_cols), at<const uint8_t>(frozen_bits)},
                     static_cast<Value>(value), found);
  }
  return py::make_tuple(found.frozen, found.first, found.live, found.strange, found.largest, found.sum, found.squares);
}

using Numbers = py::array_t<int64_t, py::array::c_style>;

Numbers as_array(const std::vector<int64_t>& numbers) {
  return Numbers(static_cast<py::ssize_t>(numbers.size()), numbers.data());
}

py::tuple distinct_numbers(const Numbers& numbers) {
  Numbers which(numbers.size());
  const std::vector<int64_t> found = distinct(numbers.data(), numbers.size(), which.mutable_data());
  return py::make_tuple(as_array(found), which);
}

// The rows of `n_rows` that are not among `frozen`, ascending; their different ages, and which of them each has.
py::tuple live_rows(const Numbers& frozen, int64_t n_rows, const py::object& ages) {
  Numbers rows(n_rows - frozen.size());
  int64_t *to = rows.mutable_data(), row = 0;
  const auto put_until = [&](int64_t end) {
    for (; row < end; ++row) *to++ = row;
    row = end + 1;
  };
  for (py::ssize_t i = 0; i < frozen.size(); ++i) put_until(frozen.data()[i]);
  put_until(n_rows);
  if (ages.is_none()) return py::make_tuple(rows, py::none(), py::none());
  const Numbers given = py::cast<Numbers>(ages);
  Numbers theirs(rows.size());
  const int64_t *from = given.data(), *live = rows.data();
  int64_t* const age = theirs.mutable_data();
  for (py::ssize_t i = 0; i < rows.size(); ++i) age[i] = from[live[i]];
  const py::tuple found = distinct_numbers(theirs);
  return py::make_tuple(rows, found[0], found[1]);
}

// A table of what it takes over.
template <typename Row>
Numbers as_table(std::vector<Row>&& rows) {
  constexpr py::ssize_t width = sizeof(Row) / sizeof(int64_t);
  auto* const kept = new std::vector<Row>(std::move(rows));
  const py::capsule owner(kept, [](void* taken) { delete static_cast<std::vector<Row>*>(taken); });
  return Numbers({static_cast<py::ssize_t>(kept->size()), width}, reinterpret_cast<const int64_t*>(kept->data()),
                 owner);
}

// Runs and chunks of parts, tables of int64. Rows of `parts` are those of `listed_rows` in kernels/parts.py.
py::tuple lists_of(const py::list& parts, int64_t longest) {
  Lists lists;
  int64_t part = 0;
  for (const py::handle& entry : parts) {
    const py::tuple row = py::reinterpret_borrow<py::tuple>(entry);
    Numbers arrays[3];
    const auto numbers = [&](size_t column) -> const int64_t* {
      if (row[column].is_none()) return nullptr;
      arrays[column] = py::cast<Numbers>(row[column]);
      return arrays[column].data();
    };
    const auto number = [&](size_t column) { return py::cast<int64_t>(row[column]); };
    lists.add({numbers(0), numbers(1), numbers(2), number(3), number(4), number(5), number(6), number(7),
               py::cast<bool>(row[8])},
              part++, longest);
  }
  return py::make_tuple(as_table(std::move(lists.runs)), as_table(std::move(lists.chunks)));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of safefreeze_kernels; use the package, not this module.";
  py::class_<Runs>(module, "Runs")
      .def(py::init([](uintptr_t parts, uintptr_t chunks, uintptr_t runs, int64_t n_chunks, bool frozen) {
             return Runs{at<const RunPart>(parts), at<const Chunk>(chunks), at<const Run>(runs), n_chunks, frozen};
           }),
           py::arg("parts"), py::arg("chunks"), py::arg("runs"), py::arg("n_chunks"), py::arg("frozen"));
  py::class_<Whereabouts>(module, "Whereabouts")
      .def(py::init([](py::type tensor, py::dict state) {
             return std::make_unique<Whereabouts>(TensorLibrary(tensor.ptr()), state.ptr());
           }),
           py::arg("tensor_type"), py::arg("state"))
      .def("hold", [](const Whereabouts& self, py::dict state) { return self.hold(state.ptr()); });
  py::class_<Gradients>(module, "Gradients")
      .def(py::init([](py::type tensor, py::list params) {
             return std::make_unique<Gradients>(TensorLibrary(tensor.ptr()), params.ptr());
           }),
           py::arg("tensor_type"), py::arg("params"))
      .def("read",
           [](Gradients& self, py::list params, py::list grads) { return self.read(params.ptr(), grads.ptr()); })
      .def_property_readonly("tables", [](const Gradients& self) {
        return std::make_pair(reinterpret_cast<uintptr_t>(self.addresses.data()),
                              reinterpret_cast<uintptr_t>(self.dtypes.data()));
      });
  module.def("distinct", &distinct_numbers, py::arg("numbers").noconvert());
  module.def("live_rows", &live_rows, py::arg("frozen").noconvert(), py::arg("n_rows"), py::arg("ages"));
  module.def("lists_of", &lists_of, py::arg("parts"), py::arg("longest"));
  module.def("trace", [](py::list tensors) { return trace(tensors.ptr()); });
  module.def("adamw", &launch_adamw);
  module.def("norm", &launch_norm);
  module.def("scale", &launch_scale);
  module.def("zero", &launch_zero);
  module.def("copy", &launch_copy);
  module.def("repack", &launch_repack);
  module.def("turn", &launch_turn);
  module.def("compare", &compare_versions);
  module.def("borrow_openmp", [](const std::string& path) { return borrow_openmp(path.c_str()); });
  module.def("choose_isa", &choose_isa);
  module.def("runnable_isas", &runnable_isas);
  module.def("isa", [] { return kernels->name; });
#if defined(SAFEFREEZE_CUDA)
  bind_cuda(module.def_submodule("cuda"));
#endif
  // What the numpy dtypes that mirror them must add up to, in bytes.
  module.attr("STRUCT_SIZES") =
      py::dict(py::arg("RunPart") = sizeof(RunPart), py::arg("Chunk") = sizeof(Chunk), py::arg("Run") = sizeof(Run),
               py::arg("AdamWTensor") = sizeof(AdamWTensor), py::arg("Scalars") = sizeof(Scalars));
}
