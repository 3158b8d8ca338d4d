// Loops over work.h calling arithmetic.h. Compiled once per instruction set (SAFEFREEZE_ISA names it); includes no
// standard C++ header with inline code, which the linker could otherwise take from the wrong instruction set.
//
// Everything is staged through a block of float32 that stays in the first-level cache: storage types are converted
// and columns gathered on the way in, undone on the way out, and one arithmetic loop serves them all. Contiguous
// float32 is worked on in place.
#include <string.h>

#include "cpu.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define SAFEFREEZE_JOIN_(a, b) a##b
#define SAFEFREEZE_JOIN(a, b) SAFEFREEZE_JOIN_(a, b)
#define SAFEFREEZE_TEXT_(a) #a
#define SAFEFREEZE_TEXT(a) SAFEFREEZE_TEXT_(a)

namespace safefreeze {
namespace {

constexpr int64_t block = 1024;

template <typename T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

int64_t width(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// ------------------------------------------------------------------------------------- storage <-> float32 stage

// Where a block of a run lies: contiguous from `start`, or picked by `cols` from `start`.
struct Place {
  int64_t start;
  const int32_t* cols;
};

template <typename T>
T pick(const T* data, Place place, int64_t i) {
  return data[place.start + (place.cols ? place.cols[i] : i)];
}

void load_f16(const uint16_t* data, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(stored));
  }
#endif
  for (; i < n; ++i) out[i] = from_f16(data[i]);
}

void store_f16(const float* values, int64_t n, uint16_t* data) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i stored = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data + i), stored);
  }
#endif
  for (; i < n; ++i) data[i] = to_f16(values[i]);
}

void load(DType dtype, int64_t address, Place place, int64_t n, float* __restrict out) {
  if (dtype == DType::f32) {
    const float* data = at<const float>(address);
    if (place.cols) {
      for (int64_t i = 0; i < n; ++i) out[i] = data[place.start + place.cols[i]];
    } else {
      memcpy(out, data + place.start, static_cast<size_t>(n) * 4);
    }
    return;
  }
  const uint16_t* data = at<const uint16_t>(address) + place.start;
  uint16_t picked[block];
  if (place.cols) {
    for (int64_t i = 0; i < n; ++i) picked[i] = data[place.cols[i]];
    data = picked;
  }
  if (dtype == DType::bf16) {
    for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(data[i]);
  } else {
    load_f16(data, n, out);
  }
}

// Put values to their places; elements whose `frozen` flag is set keep their bytes (no flags: all are written).
template <typename T>
void put(const T* __restrict values, int64_t n, T* __restrict data, Place place,
         const uint8_t* frozen) {
  if (place.cols) {
    T* row = data + place.start;
    for (int64_t i = 0; i < n; ++i) {
      if (!frozen || !frozen[i]) row[place.cols[i]] = values[i];
    }
  } else if (frozen) {
    T* run = data + place.start;
    for (int64_t i = 0; i < n; ++i) run[i] = frozen[i] ? run[i] : values[i];
  } else {
    memcpy(data + place.start, values, static_cast<size_t>(n) * sizeof(T));
  }
}

void store(DType dtype, const float* values, int64_t n, int64_t address, Place place,
           const uint8_t* frozen) {
  if (dtype == DType::f32) {
    put(values, n, at<float>(address), place, frozen);
    return;
  }
  uint16_t* data = at<uint16_t>(address);
  const bool direct = !place.cols && !frozen;
  uint16_t rounded[block];
  uint16_t* out = direct ? data + place.start : rounded;
  if (dtype == DType::bf16) {
    for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(values[i]);
  } else {
    store_f16(values, n, out);
  }
  if (!direct) put(rounded, n, data, place, frozen);
}

// A float32 view of a block: in place where that is possible, staged otherwise.
struct View {
  float* values;
  bool staged;
};

View view(DType dtype, int64_t address, Place place, int64_t n, float* stage, bool in_place = true) {
  if (in_place && dtype == DType::f32 && !place.cols) {
    return {at<float>(address) + place.start, false};
  }
  load(dtype, address, place, n, stage);
  return {stage, true};
}

// ------------------------------------------------------------------------------------------------ element bits

// One flag per element of the block, from one bit per element of the tensor.
void expand_bits(int64_t frozen_bits, Place place, int64_t n, uint8_t* __restrict flags) {
  const uint8_t* bits = at<const uint8_t>(frozen_bits);
  if (place.cols) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t element = place.start + place.cols[i];
      flags[i] = (bits[element >> 3] >> (element & 7)) & 1;
    }
    return;
  }
  for (int64_t i = 0; i < n; i += 32) {
    uint64_t word;  // unaligned: up to 7 bits of the first byte belong to the elements before
    memcpy(&word, bits + ((place.start + i) >> 3), 8);
    const uint32_t next = static_cast<uint32_t>(word >> ((place.start + i) & 7));
    for (uint32_t j = 0; j < 32; ++j) flags[i + j] = static_cast<uint8_t>((next >> j) & 1u);
  }
}

void clear_flagged(const uint8_t* __restrict flags, int64_t n, float* __restrict values) {
  for (int64_t i = 0; i < n; ++i) values[i] = flags[i] ? 0.0f : values[i];
}

// One block of a run: `n` elements, `done` of the run's came before.
struct Block {
  const Segment& segment;
  int64_t segment_index;
  Place place;   // in the tensor
  Place packed;  // in its packed twin
  int64_t n;
  int64_t done;
};

template <typename Step>
void walk(const WorkList& work, int64_t piece_index, Step step) {
  const Piece& piece = work.pieces[piece_index];
  const Segment& segment = work.segments[piece.segment];
  const int32_t* cols = at<const int32_t>(segment.cols);
  const int32_t* packed_cols = at<const int32_t>(segment.packed_cols);
  for (int64_t r = piece.begin; r < piece.end; ++r) {
    const Run run = work.runs[r];
    for (int64_t done = 0; done < run.count; done += block) {
      const int64_t n = run.count - done < block ? run.count - done : block;
      const Place place =
          cols ? Place{run.start, cols + done} : Place{run.start + done, nullptr};
      const Place packed = packed_cols ? Place{run.packed, packed_cols + done}
                                       : Place{run.packed + done, nullptr};
      step(Block{segment, piece.segment, place, packed, n, done});
    }
  }
}

// ------------------------------------------------------------------------------------------------ the operations

template <bool l2, bool amsgrad>
void adamw_block(float* __restrict p, const float* __restrict g, float* __restrict m,
                 float* __restrict v, float* __restrict v_max, int64_t n, const Scalars s) {
  for (int64_t i = 0; i < n; ++i) {
    float unused = 0.0f;
    adamw<l2, amsgrad>(p[i], g[i], m[i], v[i], amsgrad ? v_max[i] : unused, s);
  }
}

using AdamWBlock = void (*)(float*, const float*, float*, float*, float*, int64_t, Scalars);
const AdamWBlock adamw_blocks[2][2] = {
    {adamw_block<false, false>, adamw_block<false, true>},
    {adamw_block<true, false>, adamw_block<true, true>},
};

void adamw_piece(const AdamWLaunch& launch, int64_t piece) {
  const AdamWBlock update = adamw_blocks[launch.l2][launch.amsgrad];
  alignas(64) float stage[5][block];
  alignas(64) uint8_t flag_stage[block];
  walk(launch.work, piece, [&](const Block& b) {
    const AdamWTensor& tensor = launch.tensors[b.segment.tensor];
    if (tensor.grad == 0) return;
    const DType dtype = static_cast<DType>(launch.param_dtype[b.segment.tensor]);
    const DType state = static_cast<DType>(launch.state_dtype[b.segment.tensor]);
    // With element bits nothing is updated in place: what a frozen lane computes is dropped at the store.
    const uint8_t* frozen = nullptr;
    if (b.segment.frozen_bits) {
      expand_bits(b.segment.frozen_bits, b.place, b.n, flag_stage);
      frozen = flag_stage;
    }
    const View p = view(dtype, tensor.param, b.place, b.n, stage[0], !frozen);
    const View g = view(dtype, tensor.grad, b.place, b.n, stage[1]);
    const View m = view(state, tensor.exp_avg, b.packed, b.n, stage[2], !frozen);
    const View v = view(state, tensor.exp_avg_sq, b.packed, b.n, stage[3], !frozen);
    const View x = launch.amsgrad ? view(state, tensor.max_exp_avg_sq, b.packed, b.n, stage[4], !frozen)
                                  : View{nullptr, false};
    update(p.values, g.values, m.values, v.values, x.values, b.n,
           launch.scalars[launch.scalar_set[b.segment_index]]);
    if (p.staged) store(dtype, p.values, b.n, tensor.param, b.place, frozen);
    if (m.staged) store(state, m.values, b.n, tensor.exp_avg, b.packed, frozen);
    if (v.staged) store(state, v.values, b.n, tensor.exp_avg_sq, b.packed, frozen);
    if (x.staged) store(state, x.values, b.n, tensor.max_exp_avg_sq, b.packed, frozen);
  });
}

// A fixed number of running results, whatever the vector width, so that every instruction set adds in one order.
constexpr int lanes = 16;

template <NormKind kind>
double accumulate(double so_far, float value) {
  const double x = static_cast<double>(value);
  if (kind == NormKind::sum_of_squares) return so_far + x * x;
  const double magnitude = x < 0 ? -x : x;
  if (kind == NormKind::sum_of_absolutes) return so_far + magnitude;
  return (magnitude > so_far || magnitude != magnitude) ? magnitude : so_far;
}

template <NormKind kind>
void norm_block(const float* values, int64_t n, double* running) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int lane = 0; lane < lanes; ++lane) {
      running[lane] = accumulate<kind>(running[lane], values[i + lane]);
    }
  }
  for (int lane = 0; i < n; ++i, ++lane) running[lane] = accumulate<kind>(running[lane], values[i]);
}

void norm_piece(const NormLaunch& launch, int64_t piece) {
  double running[lanes] = {};
  alignas(64) float stage[block];
  alignas(64) uint8_t flags[block];
  walk(launch.work, piece, [&](const Block& b) {
         const int64_t address = launch.tensors[b.segment.tensor].data;
         if (address == 0) return;
         const bool masked = b.segment.frozen_bits != 0;
         const DType dtype = static_cast<DType>(launch.dtype[b.segment.tensor]);
         const View g = view(dtype, address, b.place, b.n, stage, !masked);
         if (masked) {
           expand_bits(b.segment.frozen_bits, b.place, b.n, flags);
           if (launch.work.frozen) {
             for (int64_t i = 0; i < b.n; ++i) flags[i] ^= 1;
           }
           clear_flagged(flags, b.n, g.values);
         }
         switch (launch.kind) {
           case NormKind::sum_of_squares:
             return norm_block<NormKind::sum_of_squares>(g.values, b.n, running);
           case NormKind::sum_of_absolutes:
             return norm_block<NormKind::sum_of_absolutes>(g.values, b.n, running);
           case NormKind::largest_absolute:
             return norm_block<NormKind::largest_absolute>(g.values, b.n, running);
         }
       });
  double total = running[0];
  for (int lane = 1; lane < lanes; ++lane) {
    if (launch.kind != NormKind::largest_absolute) {
      total += running[lane];
    } else if (running[lane] > total || running[lane] != running[lane]) {
      total = running[lane];
    }
  }
  launch.partial[piece] = total;
}

void scale_piece(const ScaleLaunch& launch, int64_t piece) {
  alignas(64) float stage[block];
  alignas(64) uint8_t flags[block];
  walk(launch.work, piece, [&](const Block& b) {
         const int64_t address = launch.tensors[b.segment.tensor].data;
         if (address == 0) return;
         const bool masked = b.segment.frozen_bits != 0;
         const DType dtype = static_cast<DType>(launch.dtype[b.segment.tensor]);
         const View g = view(dtype, address, b.place, b.n, stage, !masked);
         for (int64_t i = 0; i < b.n; ++i) g.values[i] = g.values[i] * launch.factor;
         if (masked) expand_bits(b.segment.frozen_bits, b.place, b.n, flags);
         if (g.staged) store(dtype, g.values, b.n, address, b.place, masked ? flags : nullptr);
       });
}

template <typename T>
void zero_block(T* data, Place place, int64_t n, const uint8_t* chosen) {
  if (place.cols) {
    for (int64_t i = 0; i < n; ++i) {
      if (!chosen || chosen[i]) data[place.start + place.cols[i]] = 0;
    }
  } else if (chosen) {
    T* run = data + place.start;
    for (int64_t i = 0; i < n; ++i) run[i] = chosen[i] ? T(0) : run[i];
  } else {
    memset(data + place.start, 0, static_cast<size_t>(n) * sizeof(T));
  }
}

void zero_piece(const ZeroLaunch& launch, int64_t piece) {
  alignas(64) uint8_t flags[block];
  walk(launch.work, piece, [&](const Block& b) {
         const int64_t address = launch.tensors[b.segment.tensor].data;
         if (address == 0) return;
         const uint8_t* chosen = nullptr;
         if (b.segment.frozen_bits) {
           expand_bits(b.segment.frozen_bits, b.place, b.n, flags);
           if (!launch.work.frozen) {
             for (int64_t i = 0; i < b.n; ++i) flags[i] ^= 1;
           }
           chosen = flags;
         }
         if (width(static_cast<DType>(launch.dtype[b.segment.tensor])) == 4) {
           zero_block(at<uint32_t>(address), b.place, b.n, chosen);
         } else {
           zero_block(at<uint16_t>(address), b.place, b.n, chosen);
         }
       });
}

// A live list's packed twin keeps a place, holding zero, for a frozen single element; a frozen list's twin has no
// gaps, so `skipped` counts the elements of the run not chosen so far.
template <typename T>
void copy_block(T* data, T* twin, const Block& b, const uint8_t* flags, bool frozen, bool gather,
                int64_t& skipped) {
  if (!flags && !b.place.cols && !b.packed.cols) {
    T* here = data + b.place.start;
    T* there = twin + b.packed.start;
    memcpy(gather ? there : here, gather ? here : there, static_cast<size_t>(b.n) * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < b.n; ++i) {
    T& here = data[b.place.start + (b.place.cols ? b.place.cols[i] : i)];
    if (flags && frozen) {
      if (!flags[i]) {
        ++skipped;
        continue;
      }
      T& there = twin[b.packed.start + i - skipped];
      (gather ? there : here) = gather ? here : there;
    } else {
      T& there = twin[b.packed.start + (b.packed.cols ? b.packed.cols[i] : i)];
      if (!flags || !flags[i]) {
        (gather ? there : here) = gather ? here : there;
      } else if (gather) {
        there = 0;
      }
    }
  }
}

void copy_piece(const CopyLaunch& launch, int64_t piece) {
  alignas(64) uint8_t flag_stage[block];
  int64_t skipped = 0;
  walk(launch.work, piece, [&](const Block& b) {
    const PackedTensor& tensor = launch.tensors[b.segment.tensor];
    if (tensor.data == 0) return;
    const uint8_t* flags = nullptr;
    if (b.segment.frozen_bits) {
      expand_bits(b.segment.frozen_bits, b.place, b.n, flag_stage);
      flags = flag_stage;
    }
    if (b.done == 0) skipped = 0;
    const bool frozen = launch.work.frozen;
    if (width(static_cast<DType>(launch.dtype[b.segment.tensor])) == 4) {
      copy_block(at<uint32_t>(tensor.data), at<uint32_t>(tensor.packed), b, flags, frozen,
                 launch.gather, skipped);
    } else {
      copy_block(at<uint16_t>(tensor.data), at<uint16_t>(tensor.packed), b, flags, frozen,
                 launch.gather, skipped);
    }
  });
}

}  // namespace

const CpuKernels SAFEFREEZE_JOIN(cpu_kernels_, SAFEFREEZE_ISA) = {
    SAFEFREEZE_TEXT(SAFEFREEZE_ISA), adamw_piece, norm_piece, scale_piece, zero_piece, copy_piece,
};

}  // namespace safefreeze
