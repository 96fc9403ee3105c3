// The epilogue's activations by their names in Python, and as ATen calls for the unfused paths.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/hardswish.h>
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>
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
      return at::clamp(z, 0, 6);
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

}  // namespace fastconv
