// A 2-D convolution in CUTLASS's letters, in one plain struct that every backend reads.
//
//   input  N x C x H x W      filter  K x C/G x R x S      output  N x K x P x Q
//   output[n,k,p,q] = sum over c,r,s of
//       filter[k,c,r,s] * input[n, g*C/G + c, p*stride_h - pad_h + r*dil_h, q*stride_w - pad_w +
//       s*dil_w]
//   with g = k / (K/G), and zero where the input index falls outside.
//
// fprop reads input and filter; dgrad reads grad (of the output) and filter and writes the input's
// gradient; wgrad reads grad and input and writes the filter's; bgrad sums grad over N, P, Q.
// All sizes are int64: a tensor may pass 2^31 elements.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/epilogue.h"

namespace fastconv {

enum class Direction : uint8_t { kFprop, kDgrad, kWgrad, kBgrad };
constexpr const char* name_of(Direction d) {
  return d == Direction::kFprop   ? "fprop"
         : d == Direction::kDgrad ? "dgrad"
         : d == Direction::kWgrad ? "wgrad"
                                  : "bgrad";
}

struct Conv2dProblem {
  int64_t N = 1, C = 1, H = 1, W = 1;
  int64_t K = 1, R = 1, S = 1;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_h = 0, pad_w = 0;
  int64_t dil_h = 1, dil_w = 1;
  int64_t G = 1;
  DType dtype = DType::kFloat32;
  Layout layout = Layout::kNCHW;  // of input and output (and their gradients), densely packed
  Layout filter_layout = Layout::kNCHW;  // KCRS or KRSC, densely packed
  bool filter_kept = false;              // fprop: the filter comes packed, in Conv2dArgs::packed
  bool tf32 = false;     // float32 operands may be rounded to TF32, as torch's switches say
  uint8_t winograd = 0;  // largest output tile that may be used: 0, 2 or 4
  Epilogue epilogue;     // fprop only

  FASTCONV_HOST_DEVICE int64_t P() const {
    return (H + 2 * pad_h - dil_h * (R - 1) - 1) / stride_h + 1;
  }
  FASTCONV_HOST_DEVICE int64_t Q() const {
    return (W + 2 * pad_w - dil_w * (S - 1) - 1) / stride_w + 1;
  }
  int64_t input_elements() const { return N * C * H * W; }
  int64_t filter_elements() const { return K * (C / G) * R * S; }
  int64_t output_elements() const { return N * K * P() * Q(); }
  // Multiplications and additions, the padding's included: the same for all three directions.
  double flops() const {
    return 2.0 * static_cast<double>(output_elements()) * static_cast<double>((C / G) * R * S);
  }
  // The least memory traffic: each tensor moved once.
  double bytes() const {
    const int64_t residual = epilogue.residual ? output_elements() : 0;
    return static_cast<double>(size_of(dtype)) *
           static_cast<double>(input_elements() + filter_elements() + output_elements() + residual);
  }
  bool is_depthwise() const { return G == C && G > 1; }
  bool is_1x1() const { return R == 1 && S == 1; }
};

// The pointers of one call. Which are read depends on the direction; scale and shift hold K values
// of the accumulator's type (float, or double for float64).
struct Conv2dArgs {
  const void* input = nullptr;
  const void* filter = nullptr;
  const void* packed = nullptr;  // where filter_kept: the filter as the row's `pack` left it
  const void* grad = nullptr;
  const void* scale = nullptr;
  const void* shift = nullptr;
  const void* residual = nullptr;
  void* out = nullptr;       // output, input gradient, filter gradient or bias gradient
  void* mean_out = nullptr;  // of op "conv2d_statistics": K values of the accumulator's type
  void* var_out = nullptr;
  void* workspace = nullptr;  // as many bytes as the row asked for, 64-byte aligned
};

}  // namespace fastconv
