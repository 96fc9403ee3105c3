// BatchNorm over N, H and W, in one plain struct.
//
// Direction::kFprop, training:  mean and var (biased) of each channel are computed and written;
//     out = (input - mean) / sqrt(var + eps) * weight + bias.
// Direction::kFprop, inference: the same with the mean and var that are passed in.
// Direction::kDgrad: gradients of input, weight and bias. In training mean and var depend on the
//     input; in inference they are constants.
// Statistics are (mean, M2) pairs merged by Chan's formula in a fixed order (Chan, Golub and
// LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979):
// differences of sums of squares would cancel.
#pragma once

#include <cstdint>

#include "core/conv2d_problem.h"
#include "core/dtype.h"

namespace fastconv {

struct BatchNormProblem {
  int64_t N = 1, C = 1, H = 1, W = 1;
  double eps = 1e-5;
  bool training = true;
  DType dtype = DType::kFloat32;
  Layout layout = Layout::kNCHW;

  int64_t elements() const { return N * C * H * W; }
  int64_t per_channel() const { return N * H * W; }
  double bytes() const {
    return 2.0 * static_cast<double>(elements()) * static_cast<double>(size_of(dtype));
  }
};

// input, grad and out have the problem's dtype and layout; every per-channel array has C values of
// the accumulator's type. A null weight is ones, a null bias zeros.
struct BatchNormArgs {
  const void* input = nullptr;
  const void* grad = nullptr;  // dgrad: gradient of the output
  const void* weight = nullptr;
  const void* bias = nullptr;
  const void* mean_in = nullptr;  // inference fprop, and dgrad
  const void* var_in = nullptr;
  void* mean_out = nullptr;  // training fprop
  void* var_out = nullptr;
  void* out = nullptr;          // output, or input gradient (dgrad: may be null, not wanted)
  void* grad_weight = nullptr;  // dgrad: always written
  void* grad_bias = nullptr;
  void* workspace = nullptr;  // as many bytes as the row asked for, 64-byte aligned
};

}  // namespace fastconv
