// The epilogue's activations by their names in Python, and as ATen calls for the unfused paths.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>

#include <string>
#include <string_view>

#include "core/epilogue.h"

namespace fastconv {

inline Activation activation_of(std::string_view name) {
  constexpr Activation all[] = {Activation::kNone,      Activation::kReLU, Activation::kReLU6,
                                Activation::kLeakyReLU, Activation::kSiLU, Activation::kHardSwish,
                                Activation::kSigmoid};
  std::string names;
  for (const Activation a : all) {
    if (name == name_of(a)) return a;
    names += (names.empty() ? "" : ", ") + std::string(name_of(a));
  }
  TORCH_CHECK_VALUE(false, "activation must be one of ", names, ", but got '", std::string(name),
                    "'");
}

// Differentiable, and what runs where nothing is fused.
inline at::Tensor apply_activation(const at::Tensor& z, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return z;
    case Activation::kReLU:
      return at::relu(z);
    case Activation::kReLU6:
      return at::hardtanh(z, 0, 6);  // clamp has another derivative at 0 and 6
    case Activation::kLeakyReLU:
      return at::leaky_relu(z, Epilogue().slope);
    case Activation::kSiLU:
      return at::silu(z);
    case Activation::kHardSwish:
      return at::hardswish(z);
    case Activation::kSigmoid:
      return at::sigmoid(z);
  }
  return z;
}

// activation_derivative() of core/epilogue.h in calls that are differentiable themselves.
inline at::Tensor derivative_of(const at::Tensor& z, Activation activation) {
  const auto steps = [&](const at::Tensor& mask, double below, double above) {
    return at::where(mask, at::full_like(z, below), at::full_like(z, above));
  };
  switch (activation) {
    case Activation::kNone:
      return at::ones_like(z);
    case Activation::kReLU:
      return steps(z.le(0), 0, 1);
    case Activation::kReLU6:
      return steps(z.le(0).logical_or(z.ge(6)), 0, 1);
    case Activation::kLeakyReLU:
      return steps(z.gt(0), 1, Epilogue().slope);
    case Activation::kSiLU: {
      const at::Tensor s = at::sigmoid(z);
      return s * (z * (1 - s) + 1);
    }
    case Activation::kHardSwish:
      return at::where(z.le(-3), at::zeros_like(z),
                       at::where(z.ge(3), at::ones_like(z), z / 3 + 0.5));
    case Activation::kSigmoid: {
      const at::Tensor s = at::sigmoid(z);
      return s * (1 - s);
    }
  }
  return at::ones_like(z);
}

}  // namespace fastconv
