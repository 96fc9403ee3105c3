#include "torch/batch_norm_formula.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/hardtanh.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <vector>

#include "torch/activation.h"

namespace fastconv::formula {
namespace {

using at::Tensor;

std::vector<int64_t> reduced_axes(const Tensor& t) {
  std::vector<int64_t> axes{0};
  for (int64_t axis = 2; axis < t.dim(); ++axis) axes.push_back(axis);
  return axes;
}

// C values shaped to broadcast over `like`.
Tensor per_channel(const Tensor& values, const Tensor& like) {
  std::vector<int64_t> shape(like.dim(), 1);
  shape[1] = -1;
  return values.to(accumulator_type(like)).reshape(shape);
}

// What the activation takes, in the accumulator's type.
Tensor pre_activation(const Tensor& x_hat, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& residual) {
  Tensor z = weight ? x_hat * per_channel(*weight, x_hat) : x_hat;
  if (bias) z = z + per_channel(*bias, x_hat);
  return residual ? z + residual->to(x_hat.scalar_type()) : z;
}

// Zeros whose gradient by `t` is zero: what a derivative of steps has that autograd can follow, as
// torch's own second derivatives do.
Tensor flat(const Tensor& t) {
  const Tensor zeros = at::zeros_like(t);
  return at::where(t.isnan(), zeros, at::hardtanh(t, 0, 0));
}

}  // namespace

Normalised normalise(const Tensor& input, const OptionalTensor& mean, const OptionalTensor& var,
                     double eps) {
  const Tensor x = input.to(accumulator_type(input));
  const auto axes = reduced_axes(input);
  Normalised n;
  n.mean = mean ? per_channel(*mean, input) : at::mean(x, axes, /*keepdim=*/true);
  const Tensor centred = x - n.mean;
  n.var = var ? per_channel(*var, input) : at::mean(centred * centred, axes, /*keepdim=*/true);
  n.invstd = at::rsqrt(n.var + eps);
  n.x_hat = centred * n.invstd;
  return n;
}

Tensor output(const Tensor& x_hat, const OptionalTensor& weight, const OptionalTensor& bias,
              const OptionalTensor& residual, Activation activation, at::ScalarType type) {
  return apply_activation(pre_activation(x_hat, weight, bias, residual), activation).to(type);
}

Tensor before_activation(const Tensor& grad, const Tensor& x_hat, const OptionalTensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& residual,
                         const OptionalTensor& out, Activation activation) {
  const Tensor g = grad.to(x_hat.scalar_type());
  if (activation == Activation::kNone) return g;
  const Tensor z =
      out ? out->to(x_hat.scalar_type()) : pre_activation(x_hat, weight, bias, residual);
  Tensor d = derivative_of(z, activation);
  if (derivative_from_output(activation)) {
    d = d + flat(pre_activation(x_hat, weight, bias, out ? OptionalTensor() : residual));
  }
  return at::where(d.eq(0), at::zeros_like(g), g * d);  // 0 of an infinite gradient, too
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& input,
                                                    const OptionalTensor& weight,
                                                    const OptionalTensor& bias, const Tensor& mean,
                                                    const Tensor& var,
                                                    const OptionalTensor& residual,
                                                    const OptionalTensor& out, bool training,
                                                    double eps, Activation activation) {
  const Normalised n = training ? normalise(input, {}, {}, eps) : normalise(input, mean, var, eps);
  const auto axes = reduced_axes(input);
  const Tensor g = before_activation(grad, n.x_hat, weight, bias, residual, out, activation);
  Tensor dx = g;
  if (training) {
    dx = dx - at::mean(g, axes, true) - n.x_hat * at::mean(g * n.x_hat, axes, true);
  }
  dx = dx * n.invstd;
  if (weight) dx = dx * per_channel(*weight, input);
  const auto parameter_type = weight ? weight->scalar_type() : mean.scalar_type();
  return {dx.to(input.scalar_type()), at::sum(g * n.x_hat, axes).to(parameter_type),
          at::sum(g, axes).to(parameter_type), g.to(input.scalar_type())};
}

}  // namespace fastconv::formula
