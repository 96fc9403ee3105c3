// BatchNorm with what follows it, spelled out in ATen's differentiable calls: for derivatives of
// derivatives, for forward-mode tangents, and around ATen's own BatchNorm.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "core/epilogue.h"
#include "torch/arguments.h"

namespace fastconv::formula {

// Broadcastable, in the accumulator's type; x_hat has the input's size.
struct Normalised {
  at::Tensor mean, var, invstd, x_hat;
};
// With the batch's own statistics where none are given.
Normalised normalise(const at::Tensor& input, const OptionalTensor& mean, const OptionalTensor& var,
                     double eps);

// activation(x_hat * weight + bias + residual), rounded once, to `type`.
at::Tensor output(const at::Tensor& x_hat, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, Activation activation, at::ScalarType type);

// The gradient of what the activation takes, in the accumulator's type. The activation's
// derivative is read off `out` where that is given.
at::Tensor before_activation(const at::Tensor& grad, const at::Tensor& x_hat,
                             const OptionalTensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& residual, const OptionalTensor& out,
                             Activation activation);

// Gradients of input, weight, bias and residual. In training the statistics are the input's.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const at::Tensor& mean, const at::Tensor& var,
    const OptionalTensor& residual, const OptionalTensor& out, bool training, double eps,
    Activation activation);

}  // namespace fastconv::formula
