// What BatchNorm's kernels are told, and what becomes of one element on a GPU: the normalisation,
// the residual and the activation behind it, and the way back through them.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/epilogue.h"
#include "cuda/element.h"
#include "cuda/launch.h"

namespace fastconv {
namespace cuda {

struct NormParams {
  const void *input, *grad;
  // The one tensor that may lie beside them, or null: the residual, or what `from_output` says.
  const void* beside;
  const void *weight, *bias, *mean_in, *var_in;  // accumulator's type, as the rest
  void *out, *grad_residual;                     // dgrad: either may be null
  void *mean_out, *var_out, *grad_weight, *grad_bias;
  void *first, *second, *pivot, *coefficients;  // workspace; no coefficients: from mean_in, var_in
  int64_t extent, per_slice;                    // BatchNormPlan's
  int64_t plane_packs;                          // planes, first step: HW / pack size
  int64_t plane;                                // planes, second step: HW
  int64_t blocks;                               // of a kernel that strides by the grid; or packs
  int64_t rows_of_block;                        // second step by rows
  int slices, C;
  int groups;      // rows: ceil(packs of channels / lanes)
  int lanes_log2;  // rows: threads along the packs of channels
  double eps, slope;
  Activation activation;
  bool training;
  bool from_output;  // dgrad: the derivative is read off `beside`, fprop's output
};

// What follows the normalisation, as far as a kernel is compiled for it: without anything it costs
// nothing, ReLU is what networks have, and the rest is told apart at run time.
enum class Tail : uint8_t { kNone, kReLU, kAny };

template <class A>
__device__ inline A channel_value(const void* values, int c, A when_null) {
  return values == nullptr ? when_null : static_cast<const A*>(values)[c];
}

// z's factor. fprop with an activation and dgrad both take it from here, or a z near a kink could
// lie on either side of it.
template <class A>
__device__ inline A scale_of(const NormParams& t, int c, A var) {
  return channel_value<A>(t.weight, c, A(1)) / std::sqrt(var + static_cast<A>(t.eps));
}

template <Tail kTail>
__device__ inline Activation activation_of(const NormParams& t) {
  return kTail == Tail::kReLU ? Activation::kReLU : t.activation;
}

// dz = grad * activation'(z) of one channel; `centred` is x - mean.
template <class A, Tail kTail>
struct Derivative {
  A scale, shift;  // of z, where it is computed again

  __device__ void load(const NormParams& t, int c) {
    if (kTail == Tail::kNone || t.from_output) return;
    scale = scale_of(t, c, static_cast<const A*>(t.var_in)[c]);
    shift = channel_value<A>(t.bias, c, A(0));
  }
  __device__ A at(const NormParams& t, A centred, A dy, A beside) const {
    if constexpr (kTail == Tail::kNone) return dy;
    A z = beside;
    if (!t.from_output) {
      z = centred * scale + shift;
      if (t.beside != nullptr) z += beside;
    }
    const A slope = static_cast<A>(t.slope);
    const A derivative = activation_derivative(z, activation_of<kTail>(t), slope);
    // An infinite gradient, as mixed precision makes them, ends at a flat piece: torch's does.
    return derivative == A(0) ? A(0) : dy * derivative;
  }
};

// The second step's coefficients of a channel: of fprop ...
template <class A, bool kDgrad, Tail kTail>
struct Coefficients {
  A mean, scale, shift;

  __device__ void load(const NormParams& t, int c) {
    if (t.coefficients != nullptr) {
      mean = static_cast<const A*>(t.coefficients)[c];
      scale = static_cast<const A*>(t.coefficients)[int64_t{t.C} + c];
      shift = static_cast<const A*>(t.coefficients)[int64_t{t.C} * 2 + c];
    } else {
      mean = static_cast<const A*>(t.mean_in)[c];
      scale = scale_of(t, c, static_cast<const A*>(t.var_in)[c]);
      shift = channel_value<A>(t.bias, c, A(0));
    }
  }
  __device__ A out(const NormParams& t, A x, [[maybe_unused]] A beside) const {
    A z = (x - mean) * scale + shift;
    if constexpr (kTail == Tail::kNone) return z;
    if (t.beside != nullptr) z += beside;
    return activate(z, activation_of<kTail>(t), static_cast<A>(t.slope));
  }
};

// ... and of dgrad.
template <class A, Tail kTail>
struct Coefficients<A, true, kTail> {
  A k[4];
  Derivative<A, kTail> derivative;

  __device__ void load(const NormParams& t, int c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) k[i] = static_cast<const A*>(t.coefficients)[int64_t{t.C} * i + c];
    derivative.load(t, c);
  }
  __device__ A out(const NormParams& t, A x, A dy, A beside) const {
    const A dz = derivative.at(t, x - k[0], dy, beside);
    return t.training ? ((dz - k[1]) - (x - k[0]) * k[2]) * k[3] : dz * k[3];
  }
};

// One pack of the second step; channel(e) are the coefficients of its element e.
template <class T, int kVector, bool kDgrad, Tail kTail, class Channel>
__device__ inline void second_step(const NormParams& t, int64_t offset, Channel&& channel) {
  Pack<T, kVector> x = {}, dy = {}, beside = {}, y;
  const bool again = kTail != Tail::kNone && !t.from_output;  // z
  if (!kDgrad || t.training || again) {
    x = load_pack<T, kVector>(static_cast<const T*>(t.input) + offset);
  }
  if constexpr (kDgrad) dy = load_pack<T, kVector>(static_cast<const T*>(t.grad) + offset);
  if constexpr (kTail != Tail::kNone) {
    if (t.beside != nullptr) {
      beside = load_pack<T, kVector>(static_cast<const T*>(t.beside) + offset);
    }
  }
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    const auto at = widen(x.at[e]), b = widen(beside.at[e]);
    if constexpr (kDgrad) {
      y.at[e] = narrow<T>(channel(e).out(t, at, widen(dy.at[e]), b));
    } else {
      y.at[e] = narrow<T>(channel(e).out(t, at, b));
    }
  }
  // Without an activation dz is the gradient itself: see launch().
  if constexpr (kDgrad && kTail == Tail::kAny) {
    if (t.grad_residual != nullptr) store_pack(static_cast<T*>(t.grad_residual) + offset, dy);
    if (t.out == nullptr) return;
  }
  store_pack(static_cast<T*>(t.out) + offset, y);
}

}  // namespace cuda
}  // namespace fastconv
