// BatchNorm over N, H and W with what follows it (a residual, an activation), in one plain struct.
//
// Direction::kFprop, training:  mean and var (biased) of each channel are computed and written;
//     z = (input - mean) / sqrt(var + eps) * weight + bias + residual;  out = activation(z).
// Direction::kFprop, inference: the same with the mean and var that are passed in.
// Direction::kDgrad: gradients of input, weight, bias and residual, from
//     dz = grad * activation'(z), which is the residual's. z is computed again from the input (and
//     the residual), or read off the output where derivative_from_output() allows. In training mean
//     and var depend on the input; in inference they are constants.
// Statistics are (mean, M2) pairs merged by Chan's formula in a fixed order (Chan, Golub and
// LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979):
// differences of sums of squares would cancel.
#pragma once

#include <cstdint>

#include "core/conv2d_problem.h"
#include "core/dtype.h"
#include "core/epilogue.h"

namespace fastconv {

struct BatchNormProblem {
  int64_t N = 1, C = 1, H = 1, W = 1;
  double eps = 1e-5;
  bool training = true;
  bool residual = false;  // fprop: added before the activation; dgrad: its gradient is wanted
  Activation activation = Activation::kNone;
  double slope = 0.01;  // of kLeakyReLU below zero
  DType dtype = DType::kFloat32;
  Layout layout = Layout::kNCHW;

  int64_t elements() const { return N * C * H * W; }
  int64_t per_channel() const { return N * H * W; }
  // Read and written once each; dgrad's second reading and the residual's are all rows' alike.
  double bytes() const {
    return 2.0 * static_cast<double>(elements()) * static_cast<double>(size_of(dtype));
  }
};

// input, residual, grad, output, out and grad_residual have the problem's dtype and layout; every
// per-channel array has C values of the accumulator's type. A null weight is ones, a null bias
// zeros.
struct BatchNormArgs {
  const void* input = nullptr;
  const void* residual = nullptr;  // fprop; dgrad: to compute z again, where output is null
  const void* grad = nullptr;      // dgrad: gradient of the output
  const void* output = nullptr;    // dgrad: of fprop, to take the derivative from; may be null
  const void* weight = nullptr;
  const void* bias = nullptr;
  const void* mean_in = nullptr;  // inference fprop, and dgrad
  const void* var_in = nullptr;
  void* mean_out = nullptr;  // training fprop
  void* var_out = nullptr;
  void* out = nullptr;            // output, or input gradient (dgrad: may be null, not wanted)
  void* grad_residual = nullptr;  // dgrad: may be null, not wanted
  void* grad_weight = nullptr;    // dgrad: always written
  void* grad_bias = nullptr;
  void* workspace = nullptr;  // as many bytes as the row asked for, 64-byte aligned
};

}  // namespace fastconv
