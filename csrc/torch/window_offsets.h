// Two spellings of where a maximum stood: our offset r * S + s inside its window, and torch's index
// h * W + w in the input's plane. Written in ATen calls, for double backward, forward-mode
// derivatives and ATen fallbacks: none of them is on a fast path.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>

#include "torch/arguments.h"

namespace fastconv {

// uint8 while r * S + s fits.
inline at::ScalarType offset_type(c10::SymIntArrayRef kernel_size) {
  return kernel_size.front() * kernel_size.back() <= 256 ? at::kByte : at::kInt;
}

// h (axis 0) or w (axis 1) of each window's first tap, shaped to broadcast over (P, Q).
inline at::Tensor window_origins(const at::Tensor& index, const Pool2dSizes& sizes, int axis) {
  at::Tensor position = at::arange(index.size(-2 + axis), index.options().dtype(at::kLong)) *
                            sizes.stride[axis].expect_int() -
                        sizes.padding[axis].expect_int();
  return axis == 0 ? position.unsqueeze(1) : position;
}

inline at::Tensor indices_from_offsets(const at::Tensor& index, int64_t W,
                                       const Pool2dSizes& sizes) {
  if (index.scalar_type() == at::kLong) return index;
  const int64_t S = sizes.window[1].expect_int();
  const at::Tensor offset = index.to(at::kLong);
  const at::Tensor r = offset.div(S, "floor");
  const at::Tensor h = window_origins(index, sizes, 0) + r * sizes.dilation[0].expect_int();
  const at::Tensor w =
      window_origins(index, sizes, 1) + (offset - r * S) * sizes.dilation[1].expect_int();
  return h * W + w;
}

inline at::Tensor offsets_from_indices(const at::Tensor& index, int64_t W, const Pool2dSizes& sizes,
                                       at::ScalarType type) {
  const at::Tensor h = index.div(W, "floor");
  const at::Tensor w = index - h * W;
  const at::Tensor r =
      (h - window_origins(index, sizes, 0)).div(sizes.dilation[0].expect_int(), "floor");
  const at::Tensor s =
      (w - window_origins(index, sizes, 1)).div(sizes.dilation[1].expect_int(), "floor");
  return (r * sizes.window[1].expect_int() + s).to(type);
}

}  // namespace fastconv
