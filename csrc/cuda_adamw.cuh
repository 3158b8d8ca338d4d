// The AdamW step of csrc/cuda.cu.
#pragma once

#include "cuda_places.cuh"

namespace safefreeze::cuda {
namespace {

// noise_of, for an element that is not known when compiling: registers cannot be indexed.
__device__ __forceinline__ uint16_t noise_at(const Words& eight, uint32_t element) {
  const uint32_t even = element & 4 ? eight.word[2] : eight.word[0], odd = element & 4 ? eight.word[3] : eight.word[1];
  return noise_of({{element & 2 ? odd : even}}, element & 1);
}

// What an AdamW step is made of at compile time: storage types, rounding of the parameter, and what follows from these.
template <typename P_, typename S_, Rounding rounding, bool amsgrad_>
struct AdamWKind {
  using P = P_;
  using S = S_;
  using Param = typename P::Stored;
  using State = typename S::Stored;
  static constexpr bool amsgrad = amsgrad_;
  static constexpr bool remainder = rounding == Rounding::remainder, stochastic = rounding == Rounding::stochastic;
  static constexpr bool nearest = !remainder && !stochastic;
  static constexpr bool coded = std::is_same_v<S, Codes>;
  // Of the widest operand 16 bytes: those of a warp's threads lie side by side, and of others too.
  static constexpr int whole = access / (sizeof(Param) > sizeof(State) ? sizeof(Param) : sizeof(State));
  // As many as there are registers for.
  static constexpr bool many = amsgrad && remainder;  // operands
  static constexpr int apart = stochastic || many || coded ? 1 : 2;
};

// What the threads of a block share: in shared memory it takes up no registers.
template <typename Kind>
struct AdamWTask {
  Tile tile;
  TilePart part;
  Pieces pieces;
  AdamWTensor tensor;  // from the tile's first element on, as ages
  int64_t grad;
  const Scalars* rows;  // the part's
  uint32_t number, noise_base;
  bool whole, gapless;
  Scalars scalars;

  __device__ __forceinline__ void prepare(const AdamWTiles& launch) {
    constexpr int64_t param = sizeof(typename Kind::Param), state = sizeof(typename Kind::State);
    const Tile t = launch.work.tiles[blockIdx.x];
    const TilePart of = launch.work.parts[t.part];
    AdamWTensor from = launch.tensors[t.tensor];
    int64_t g = launch.grads[t.tensor].data;
    const Scalars* const first_row = launch.scalars + launch.scalar_set[t.part] + t.age;
    from.param += t.start * param;
    from.exp_avg += t.packed * state;
    from.exp_avg_sq += t.packed * state;
    from.max_exp_avg_sq += t.packed * state;
    from.remainder += t.packed * 2;
    if (g) g += (from.packed_grad ? t.packed : t.start) * param;
    const int64_t params = from.param | g,
                  states = from.exp_avg | from.exp_avg_sq | (Kind::amsgrad ? from.max_exp_avg_sq : 0);
    constexpr int64_t n = Kind::whole;
    // Whole, frozen elements are written back as they are: no other part may visit them meanwhile.
    whole = (params % (n * param) | states % (n * state) | (Kind::remainder ? from.remainder % (n * 2) : 0) |
             obstacles<n>(t, of) | of.ages | (of.frozen_bits ? of.shared | of.gapless : 0) |
             (Kind::stochastic ? t.start % n : 0)) == 0;
    gapless = of.frozen_bits && of.gapless;
    tile = t;
    part = of;
    pieces = Pieces::of(t);
    if (of.ages) part.ages += t.packed * 2;
    tensor = from;
    grad = g;
    number = static_cast<uint32_t>(from.number);
    if (Kind::coded) noise_base = noise_seed(launch.seed, number);
    rows = first_row;
    scalars = *first_row;
    if (launch.multiplier) scalars.grad_multiplier = scalars.grad_multiplier * *launch.multiplier;
  }
};

// The elements a thread holds, as they are stored.
template <typename Kind, int n>
struct AdamWValues {
  using P = typename Kind::P;
  using S = typename Kind::S;
  Values<typename Kind::Param, n> p, g;
  Values<typename Kind::State, n> m, v, v_max;
  Values<uint16_t, n> r, age;

  template <typename Places>
  __device__ __forceinline__ void load(const AdamWTask<Kind>& task, const Places& places) {
    p = places.load(at<typename Kind::Param>(task.tensor.param));
    const auto* const grad = at<const typename Kind::Param>(task.grad);
    g = places.load_either(grad, read_anew(task.tensor.packed_grad) != 0);
    m = places.load_packed(at<typename Kind::State>(task.tensor.exp_avg));
    v = places.load_packed(at<typename Kind::State>(task.tensor.exp_avg_sq));
    if constexpr (Kind::amsgrad) v_max = places.load_packed(at<typename Kind::State>(task.tensor.max_exp_avg_sq));
    if constexpr (Kind::remainder) r = places.load_packed(at<uint16_t>(task.tensor.remainder));
    if constexpr (Places::apart) {
      if (task.part.ages) age = places.load_packed(at<const uint16_t>(task.part.ages));
    }
  }

  template <typename Places>
  __device__ __forceinline__ void store(const AdamWTask<Kind>& task, const Places& places) {
    if constexpr (!Places::apart) {
      if (places.chosen != Places::all) keep_old(task, places);
    }
    places.store(at<typename Kind::Param>(task.tensor.param), p);
    places.store_packed(at<typename Kind::State>(task.tensor.exp_avg), m);
    places.store_packed(at<typename Kind::State>(task.tensor.exp_avg_sq), v);
    if constexpr (Kind::amsgrad) places.store_packed(at<typename Kind::State>(task.tensor.max_exp_avg_sq), v_max);
    if constexpr (Kind::remainder) places.store_packed(at<uint16_t>(task.tensor.remainder), r);
  }

  __device__ __forceinline__ float param(int i) const {
    if constexpr (Kind::remainder) {
      return from_remainder(p.of[i], r.of[i]);
    } else {
      return widen<P>(p, i);
    }
  }

  // The moments of element i.
  __device__ __forceinline__ void read_moments(int i, float& m_i, float& v_i, float& v_max_i) const {
    if constexpr (Kind::coded) {
      decode_moments<uint32_t>(m.of[i], v.of[i], m_i, v_i);
      if constexpr (Kind::amsgrad) v_max_i = float_of(largest_bits_of<uint32_t>(v_max.of[i]));
    } else {
      m_i = widen<S>(m, i);
      v_i = widen<S>(v, i);
      if constexpr (Kind::amsgrad) v_max_i = widen<S>(v_max, i);
    }
  }

  // The new values of elements i to i + count - 1. `noise(k)`: 16 bits for element i + k, of stochastic rounding;
  // `coding(k)`: 32 for its moments, if they are codes.
  template <int count, typename Noise, typename Coding>
  __device__ __forceinline__ void keep(int i, const float (&new_p)[count], const float (&new_m)[count],
                                       const float (&new_v)[count], const float (&new_v_max)[count], Noise noise,
                                       Coding coding) {
    if constexpr (Kind::coded) {
#pragma unroll
      for (int k = 0; k < count; ++k) {
        uint32_t first, second;
        encode_moments<uint32_t>(new_m[k], new_v[k], coding(k), first, second);
        m.of[i + k] = static_cast<uint8_t>(first);
        v.of[i + k] = static_cast<uint8_t>(second);
        if constexpr (Kind::amsgrad) v_max.of[i + k] = static_cast<uint8_t>(largest_code_of(bits_in(new_v_max[k])));
      }
    } else {
      put<S>(m, i, new_m);
      put<S>(v, i, new_v);
      if constexpr (Kind::amsgrad) put<S>(v_max, i, new_v_max);
    }
    if constexpr (Kind::nearest) put<P>(p, i, new_p);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      some_nan |= new_p[k] != new_p[k];  // where a moment is
      if constexpr (Kind::remainder) p.of[i + k] = to_remainder(new_p[k], r.of[i + k]);
      if constexpr (Kind::stochastic) p.of[i + k] = P::narrow(new_p[k], noise(k));
    }
    if constexpr (n > 1) {
      pin_all(p, g, m, v);
      if constexpr (Kind::amsgrad) pin(v_max);
      if constexpr (Kind::remainder) pin(r);
    }
  }

  // After the last element.
  __device__ __forceinline__ void finish() {
    if (!some_nan) return;
    mend<S>(m);
    mend<S>(v);
    if constexpr (Kind::amsgrad) mend<S>(v_max);
    if constexpr (Kind::nearest) mend<P>(p);
  }

 private:
  bool some_nan = false;

  // Reads them again: kept since they were loaded, they would take up registers.
  __device__ __forceinline__ void keep_old(const AdamWTask<Kind>& task, Whole<n> places) {
    asm volatile("" : "+r"(places.here), "+r"(places.there));
    const auto again = [&](auto& values, const auto& old) { blend(values, old, places.chosen); };
    again(p, places.load(at<typename Kind::Param>(task.tensor.param)));
    again(m, places.load_packed(at<typename Kind::State>(task.tensor.exp_avg)));
    again(v, places.load_packed(at<typename Kind::State>(task.tensor.exp_avg_sq)));
    if constexpr (Kind::amsgrad) again(v_max, places.load_packed(at<typename Kind::State>(task.tensor.max_exp_avg_sq)));
    if constexpr (Kind::remainder) again(r, places.load_packed(at<uint16_t>(task.tensor.remainder)));
  }
};

template <typename P, typename S, Rounding rounding, bool amsgrad>
__global__ void __launch_bounds__(threads, 4) adamw_kernel(const __grid_constant__ AdamWTiles launch) {
  using Kind = AdamWKind<P, S, rounding, amsgrad>;
  __shared__ AdamWTask<Kind> task;
  if (launch.skip && *launch.skip != 0.0f) return;
  __shared__ Visited visited;
  if (threadIdx.x == 0) task.prepare(launch);
  __syncthreads();
  if (!task.grad) return;
  if (task.gapless) {
    const uint32_t found = visited.find(task.tile, task.part, false);
    if (threadIdx.x == 0) {
      task.tile.count = static_cast<int32_t>(found);
      task.part.frozen_bits = 0;
    }
    __syncthreads();
  }
  Scalars s = task.scalars;
  const auto take = [&, s](const auto& places) mutable {
    using Places = std::remove_reference_t<decltype(places)>;
    constexpr int size = Places::size;
    AdamWValues<Kind, size> values;
    values.load(task, places);
    [[maybe_unused]] Words eight{};
    if constexpr (Kind::stochastic) {  // of eight neighbours, of the half of them that these are, or of one element
      uint32_t step = s.step;
      if constexpr (Places::apart) {
        if (task.part.ages) step = task.rows[values.age.of[0]].step;
      }
      const int64_t first = task.tile.start + places.in_tensor(0);
      eight = noise_of_eight(launch.seed, step, task.number, first / 8);
      if (size == 4 && first & 4) eight = {{eight.word[2], eight.word[3]}};
    }
    constexpr int count = Places::apart ? 1 : 2;
#pragma unroll
    for (int i = 0; i < size; i += count) {
      float p[count], m[count], v[count], v_max[count] = {};
      if constexpr (Kind::many) {
        s.grad_multiplier = read_anew(task.scalars.grad_multiplier);
        s.decay = read_anew(task.scalars.decay);
        s.beta1 = read_anew(task.scalars.beta1);
        s.one_minus_beta1 = read_anew(task.scalars.one_minus_beta1);
        s.beta2 = read_anew(task.scalars.beta2);
        s.one_minus_beta2 = read_anew(task.scalars.one_minus_beta2);
        s.step_size = read_anew(task.scalars.step_size);
        s.bias2_sqrt = read_anew(task.scalars.bias2_sqrt);
        s.eps = read_anew(task.scalars.eps);
      }
      const auto update = [&](auto l2) {
#pragma unroll
        for (int k = 0; k < count; ++k) {
          Scalars own = s;
          if constexpr (Places::apart) {
            if (task.part.ages) {
              const Scalars& row = task.rows[values.age.of[i + k]];
              own.step_size = row.step_size;
              own.bias2_sqrt = row.bias2_sqrt;
            }
          }
          values.read_moments(i + k, m[k], v[k], v_max[k]);
          p[k] = values.param(i + k);
          const float g = widen<P>(values.g, i + k);
          safefreeze::adamw<decltype(l2)::value, amsgrad>(p[k], g, m[k], v[k], v_max[k], own);
        }
      };
      launch.l2 ? update(std::true_type{}) : update(std::false_type{});
      const auto noise = [&](int k) {
        const uint32_t element = static_cast<uint32_t>(task.tile.start) + places.in_tensor(i + k);
        return size >= 4 ? noise_of(eight, i + k) : noise_at(eight, element);
      };
      const auto coding = [&](int k) {
        uint32_t step = s.step;
        if constexpr (Places::apart) {
          if (task.part.ages) step = task.rows[values.age.of[i + k]].step;
        }
        const uint64_t element = static_cast<uint64_t>(task.tile.start) + places.in_tensor(i + k);
        return moment_noise(noise_key(task.noise_base, step), element);
      };
      values.template keep<count>(i, p, m, v, v_max, noise, coding);
    }
    values.finish();
    values.store(task, places);
  };
  walk<Kind::whole, Kind::apart>(task.tile, task.part, task.pieces, false, task.whole, take,
                                 task.gapless ? &visited : nullptr);
}

}  // namespace
}  // namespace safefreeze::cuda
