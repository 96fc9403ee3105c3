// Autograd of BatchNorm with its residual and activation: one kernel forward, one backward. Where a
// derivative of a derivative or a forward-mode tangent is asked for, batch_norm_formula.h is.
#include "torch/autograd_batch_norm.h"

#include <torch/library.h>

#include "torch/activation.h"
#include "torch/batch_norm_formula.h"
#include "torch/history.h"
#include "torch/ops.h"

namespace fastconv {
namespace {

using at::Tensor;

struct BatchNormBackward : FastconvNode {  // edges: input, weight, bias, residual
  SavedVariable input;
  SavedBatchNorm norm;

  void release_variables() override {
    input.reset_data();
    norm.reset();
  }
  std::string name() const override { return "FastconvBatchNormBackward"; }
  variable_list backward(const Tensor& grad) override {
    return norm.backward(grad, input.unpack(), {wants(0), wants(1), wants(2), wants(3)});
  }
};

std::tuple<Tensor, Tensor, Tensor> batch_norm_training(const Tensor& input,
                                                       const OptionalTensor& weight,
                                                       const OptionalTensor& bias,
                                                       const OptionalTensor& residual, double eps,
                                                       std::string_view activation) {
  check_batch_norm(input, weight, bias, std::nullopt, std::nullopt, /*training=*/true);
  if (any_tangent(input, weight, bias, residual)) {
    check_residual("batch_norm", residual, input.sym_sizes(), input);
    const auto n = formula::normalise(input, {}, {}, eps);
    const auto statistic = [](const Tensor& t) { return t._fw_primal(0).detach().flatten(); };
    return {formula::output(n.x_hat, weight, bias, residual, activation_of(activation),
                            input.scalar_type()),
            statistic(n.mean), statistic(n.var)};
  }
  auto [out, mean, var] = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::batch_norm_training(input, weight, bias, residual, eps, activation);
  }();
  set_batch_norm_history(out, input, weight, bias, mean, var, residual, /*training=*/true, eps,
                         activation);
  return {out, mean, var};  // mean and var carry no gradient: they feed the running statistics
}

Tensor batch_norm_inference(const Tensor& input, const OptionalTensor& weight,
                            const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                            const OptionalTensor& residual, double eps,
                            std::string_view activation) {
  check_batch_norm(input, weight, bias, mean, var, /*training=*/false);
  if (any_tangent(input, weight, bias, residual)) {
    check_residual("batch_norm", residual, input.sym_sizes(), input);
    const Tensor x_hat = formula::normalise(input, mean, var, eps).x_hat;
    return formula::output(x_hat, weight, bias, residual, activation_of(activation),
                           input.scalar_type());
  }
  const Tensor out = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return ops::batch_norm_inference(input, weight, bias, mean, var, residual, eps, activation);
  }();
  set_batch_norm_history(out, input, weight, bias, mean, var, residual, /*training=*/false, eps,
                         activation);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& grad, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, const OptionalTensor& output, bool training, double eps,
    std::string_view activation, std::array<bool, 4> output_mask) {
  if (torch::autograd::compute_requires_grad(grad, input, weight, bias, residual) ||
      any_tangent(grad, input, weight, bias, residual)) {
    auto [dx, dw, db, dr] = formula::backward(grad, input, weight, bias, mean, var, residual,
                                              output, training, eps, activation_of(activation));
    return {output_mask[0] ? dx : Tensor(), output_mask[1] ? dw : Tensor(),
            output_mask[2] ? db : Tensor(), output_mask[3] ? dr : Tensor()};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return ops::batch_norm_backward(grad, input, weight, bias, mean, var, residual, output, training,
                                  eps, activation, output_mask);
}

}  // namespace

void SavedBatchNorm::keep(const OptionalTensor& w, const OptionalTensor& b, const Tensor& m,
                          const Tensor& v, const OptionalTensor& r, const Tensor& out, bool train,
                          double e, std::string_view name) {
  const Activation act = activation_of(name);
  const bool activates = act != Activation::kNone;
  const bool from_output = activates && r && derivative_from_output(act);
  weight.keep(w);
  mean.keep(m);
  var.keep(v);
  if (activates && !from_output) {
    bias.keep(b);
    residual.keep(r);
  }
  // Detached: the output itself would keep this node alive. Its derivative is zero almost
  // everywhere, since only piecewise linear activations come here.
  if (from_output) output.keep(out.detach());
  training = train;
  eps = e;
  activation = name;
}

void SavedBatchNorm::reset() {
  for (SavedTensor* t : {&weight, &bias, &mean, &var, &residual, &output}) t->reset();
}

variable_list SavedBatchNorm::backward(const Tensor& grad, const Tensor& input,
                                       std::array<bool, 4> wanted) {
  // Without an activation the residual's gradient is the output's, and no kernel writes it again.
  const bool passes = wanted[3] && activation_of(activation) == Activation::kNone;
  auto [dx, dw, db, dr] =
      ops::batch_norm_backward(grad, input, weight.unpack(), bias.unpack(), *mean.unpack(),
                               *var.unpack(), residual.unpack(), output.unpack(), training, eps,
                               activation, {wanted[0], wanted[1], wanted[2], wanted[3] && !passes});
  return {dx, dw, db, passes ? grad : dr};
}

void set_batch_norm_history(const Tensor& out, const Tensor& input, const OptionalTensor& weight,
                            const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                            const OptionalTensor& residual, bool training, double eps,
                            std::string_view activation) {
  const auto node = make_node<BatchNormBackward>(input, weight, bias, residual);
  if (!node) return;
  node->input = save(input);
  node->norm.keep(weight, bias, mean, var, residual, out, training, eps, activation);
  set_history(out, node);
}

TORCH_LIBRARY_IMPL(fastconv, Autograd, m) {
  m.impl("batch_norm_training", &batch_norm_training);
  m.impl("batch_norm_inference", &batch_norm_inference);
  m.impl("batch_norm_backward", &batch_norm_backward);
}

}  // namespace fastconv
