// Autograd of BatchNorm: one kernel forward, one backward. Where a derivative of a derivative or a
// forward-mode tangent is asked for, the formula is spelled out in ATen's differentiable calls.
#include <ATen/TensorOperators.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <vector>

#include "torch/history.h"
#include "torch/launch.h"
#include "torch/node.h"
#include "torch/ops.h"

namespace fastconv {
namespace {

using at::Tensor;

// ---- the formula, differentiable ----

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

struct Normalised {
  Tensor mean, var, invstd, x_hat;  // broadcastable; x_hat of the input's size
};

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

Tensor affine(const Tensor& x_hat, const Tensor& input, const OptionalTensor& weight,
              const OptionalTensor& bias) {
  Tensor y = weight ? x_hat * per_channel(*weight, input) : x_hat;
  if (bias) y = y + per_channel(*bias, input);
  return y.to(input.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> backward_formula(const Tensor& grad, const Tensor& input,
                                                    const OptionalTensor& weight,
                                                    const Tensor& mean, const Tensor& var,
                                                    bool training, double eps) {
  const Normalised n = training ? normalise(input, {}, {}, eps) : normalise(input, mean, var, eps);
  const auto axes = reduced_axes(input);
  const Tensor g = grad.to(accumulator_type(input));
  Tensor dx = g;
  if (training) {
    dx = dx - at::mean(g, axes, true) - n.x_hat * at::mean(g * n.x_hat, axes, true);
  }
  dx = dx * n.invstd;
  if (weight) dx = dx * per_channel(*weight, input);
  const auto parameter_type = weight ? weight->scalar_type() : mean.scalar_type();
  return {dx.to(input.scalar_type()), at::sum(g * n.x_hat, axes).to(parameter_type),
          at::sum(g, axes).to(parameter_type)};
}

// ---- nodes ----

struct BatchNormBackward : FastconvNode {  // edges: input, weight, bias
  SavedVariable input, weight, mean, var;
  bool has_weight = false, training = false;
  double eps = 0;

  void keep(const Tensor& x, const OptionalTensor& w, const Tensor& m, const Tensor& v, bool train,
            double e) {
    input = save(x);
    has_weight = w.has_value();
    if (has_weight) weight = save(*w);
    mean = save(m);
    var = save(v);
    training = train;
    eps = e;
  }
  void release_variables() override {
    input.reset_data();
    weight.reset_data();
    mean.reset_data();
    var.reset_data();
  }
  std::string name() const override { return "FastconvBatchNormBackward"; }
  variable_list backward(const Tensor& grad) override {
    const OptionalTensor w = has_weight ? OptionalTensor(weight.unpack()) : OptionalTensor();
    auto [dx, dw, db] =
        ops::batch_norm_backward(grad, input.unpack(), w, mean.unpack(), var.unpack(), training,
                                 eps, {wants(0), wants(1), wants(2)});
    return {dx, dw, db};
  }
};

bool any_tangent(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias) {
  return has_tangent(input) || has_tangent(weight) || has_tangent(bias);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_training(const Tensor& input,
                                                       const OptionalTensor& weight,
                                                       const OptionalTensor& bias, double eps) {
  check_batch_norm(input, weight, bias, std::nullopt, std::nullopt, /*training=*/true);
  if (any_tangent(input, weight, bias)) {
    const Normalised n = normalise(input, {}, {}, eps);
    const auto statistic = [](const Tensor& t) { return t._fw_primal(0).detach().flatten(); };
    return {affine(n.x_hat, input, weight, bias), statistic(n.mean), statistic(n.var)};
  }
  auto [out, mean, var] = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::batch_norm_training(input, weight, bias, eps);
  }();
  set_batch_norm_training_history(out, input, weight, bias, mean, var, eps);
  return {out, mean, var};
}

Tensor batch_norm_inference(const Tensor& input, const OptionalTensor& weight,
                            const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                            double eps) {
  check_batch_norm(input, weight, bias, mean, var, /*training=*/false);
  if (any_tangent(input, weight, bias)) {
    return affine(normalise(input, mean, var, eps).x_hat, input, weight, bias);
  }
  const auto node = make_node<BatchNormBackward>(input, weight, bias);
  if (node) node->keep(input, weight, mean, var, /*train=*/false, eps);
  const Tensor out = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::batch_norm_inference(input, weight, bias, mean, var, eps);
  }();
  set_history(out, node);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const Tensor& input,
                                                       const OptionalTensor& weight,
                                                       const Tensor& mean, const Tensor& var,
                                                       bool training, double eps,
                                                       std::array<bool, 3> output_mask) {
  if (torch::autograd::compute_requires_grad(grad, input, weight) || has_tangent(grad) ||
      any_tangent(input, weight, std::nullopt)) {
    auto [dx, dw, db] = backward_formula(grad, input, weight, mean, var, training, eps);
    return {output_mask[0] ? dx : Tensor(), output_mask[1] ? dw : Tensor(),
            output_mask[2] ? db : Tensor()};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::batch_norm_backward(grad, input, weight, mean, var, training, eps, output_mask);
}

}  // namespace

void set_batch_norm_training_history(const Tensor& out, const Tensor& input,
                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                     const Tensor& mean, const Tensor& var, double eps) {
  const auto node = make_node<BatchNormBackward>(input, weight, bias);
  if (node) node->keep(input, weight, mean, var, /*train=*/true, eps);
  set_history(out, node);  // mean and var carry no gradient: they feed the running statistics
}

TORCH_LIBRARY_IMPL(fastconv, Autograd, m) {
  m.impl("batch_norm_training", &batch_norm_training);
  m.impl("batch_norm_inference", &batch_norm_inference);
  m.impl("batch_norm_backward", &batch_norm_backward);
}

}  // namespace fastconv
