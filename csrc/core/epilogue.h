// What happens to a convolution's result between its accumulator and the store, in this order:
//   z = scale[k] * acc + shift[k] + residual[n, k, p, q];   y = round(activation(z)).
// A bias is a shift; an inference BatchNorm is a scale and a shift.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"

namespace fastconv {

enum class Activation : uint8_t { kNone, kReLU, kReLU6, kLeakyReLU, kSiLU, kHardSwish, kSigmoid };

// Max pooling between the activation and the store: rows of op "conv2d_max_pool2d" alone. A
// window's taps outside the convolution's output count as -inf; NaN and ties as in max_pool2d.
struct EpiloguePool {
  int64_t R = 1, S = 1;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_h = 0, pad_w = 0;

  // Pooled height and width of a convolution's P and Q.
  FASTCONV_HOST_DEVICE int64_t P(int64_t rows) const {
    return (rows + 2 * pad_h - R) / stride_h + 1;
  }
  FASTCONV_HOST_DEVICE int64_t Q(int64_t cols) const {
    return (cols + 2 * pad_w - S) / stride_w + 1;
  }
};

struct Epilogue {
  bool scale = false;     // one factor a filter
  bool shift = false;     // one summand a filter
  bool residual = false;  // a tensor of the output's shape, dtype and layout
  Activation activation = Activation::kNone;
  double slope = 0.01;  // of kLeakyReLU below zero
  EpiloguePool pool;    // of op "conv2d_max_pool2d"
  // Mean and biased variance of each filter's results over N, P and Q, rounded as they are stored:
  // rows of op "conv2d_statistics" alone.
  bool statistics = false;

  bool empty() const { return !scale && !shift && !residual && activation == Activation::kNone; }
};

constexpr const char* name_of(Activation a) {
  switch (a) {
    case Activation::kNone:
      return "none";
    case Activation::kReLU:
      return "relu";
    case Activation::kReLU6:
      return "relu6";
    case Activation::kLeakyReLU:
      return "leaky_relu";
    case Activation::kSiLU:
      return "silu";
    case Activation::kHardSwish:
      return "hardswish";
    case Activation::kSigmoid:
      return "sigmoid";
  }
  return "?";
}

// Comparisons are written so that NaN passes through, as torch's activations let it.
template <class T>
FASTCONV_HOST_DEVICE inline T activate(T z, Activation a, T slope) {
  switch (a) {
    case Activation::kNone:
      return z;
    case Activation::kReLU:
      return z < T(0) ? T(0) : z;
    case Activation::kReLU6:
      return z < T(0) ? T(0) : z > T(6) ? T(6) : z;
    case Activation::kLeakyReLU:
      return z < T(0) ? z * slope : z;
    case Activation::kSiLU:
      return z / (T(1) + std::exp(-z));
    case Activation::kHardSwish: {
      const T gate = z + T(3);
      return z * (gate < T(0) ? T(0) : gate > T(6) ? T(6) : gate) / T(6);
    }
    case Activation::kSigmoid:
      return T(1) / (T(1) + std::exp(-z));
  }
  return z;
}

// d activate(z) / d z. At the kinks as torch's: 0 at ReLU's, and at both of ReLU6's; NaN passes.
template <class T>
FASTCONV_HOST_DEVICE inline T activation_derivative(T z, Activation a, T slope) {
  switch (a) {
    case Activation::kNone:
      return T(1);
    case Activation::kReLU:
      return z <= T(0) ? T(0) : T(1);
    case Activation::kReLU6:
      return z <= T(0) || z >= T(6) ? T(0) : T(1);
    case Activation::kLeakyReLU:
      return z > T(0) ? T(1) : slope;
    case Activation::kSiLU: {
      const T s = T(1) / (T(1) + std::exp(-z));
      return s * (T(1) + z * (T(1) - s));
    }
    case Activation::kHardSwish:
      return z <= T(-3) ? T(0) : z >= T(3) ? T(1) : z / T(3) + T(0.5);
    case Activation::kSigmoid: {
      const T s = T(1) / (T(1) + std::exp(-z));
      return s * (T(1) - s);
    }
  }
  return T(1);
}

// Whether activation_derivative(activate(z)) is activation_derivative(z): then backward may read
// the output where it would need z.
constexpr bool derivative_from_output(Activation a) {
  return a == Activation::kNone || a == Activation::kReLU || a == Activation::kReLU6 ||
         a == Activation::kLeakyReLU;
}

}  // namespace fastconv
