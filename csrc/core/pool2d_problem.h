// 2-D pooling: max, average and adaptive average, forward and backward, in one plain struct.
//
// Direction::kFprop reads input and writes out (and, for max pooling, the position of each
// maximum); Direction::kDgrad reads grad and, for max pooling, those positions, and writes the
// input's gradient.
#pragma once

#include <cstdint>

#include "core/conv2d_problem.h"
#include "core/dtype.h"

namespace fastconv {

enum class PoolKind : uint8_t { kMax, kAverage, kAdaptiveAverage };

// How the position of a window's maximum is kept for backward.
enum class PoolIndex : uint8_t {
  kNone,        // inference: not kept
  kOffset8,     // uint8: r * S + s inside the window, when R * S <= 256
  kOffset32,    // int32: the same for larger windows
  kFlatIndex64  // int64: h * W + w in the input plane, what torch's return_indices gives
};

struct Pool2dProblem {
  PoolKind kind = PoolKind::kMax;
  int64_t N = 1, C = 1, H = 1, W = 1;
  int64_t P = 1,
          Q = 1;  // given, not derived: ceil_mode and adaptive sizes are the caller's to solve
  int64_t R = 1, S = 1;  // window (unused by kAdaptiveAverage)
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_h = 0, pad_w = 0;
  int64_t dil_h = 1, dil_w = 1;  // kMax only
  bool count_include_pad = true;
  int64_t divisor_override = 0;  // 0: none
  PoolIndex index = PoolIndex::kNone;
  DType dtype = DType::kFloat32;
  Layout layout = Layout::kNCHW;  // of every tensor of the call, the kept positions included

  int64_t input_elements() const { return N * C * H * W; }
  int64_t output_elements() const { return N * C * P * Q; }
  double bytes() const {
    const int64_t index_bytes = index == PoolIndex::kNone       ? 0
                                : index == PoolIndex::kOffset8  ? 1
                                : index == PoolIndex::kOffset32 ? 4
                                                                : 8;
    return static_cast<double>(size_of(dtype) * (input_elements() + output_elements()) +
                               index_bytes * output_elements());
  }
};

struct Pool2dArgs {
  const void* input = nullptr;  // fprop
  const void* grad = nullptr;   // dgrad: gradient of the output
  const void* index_in = nullptr;
  void* index_out = nullptr;
  void* out = nullptr;        // output, or input gradient
  void* workspace = nullptr;  // as many bytes as the row asked for, 64-byte aligned
};

}  // namespace fastconv
