// BatchNorm on real tensors, CPU and CUDA alike: lay out, choose a row, run.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "torch/activation.h"
#include "torch/arguments.h"
#include "torch/batch_norm_formula.h"
#include "torch/launch.h"

namespace fastconv {
namespace {

using at::Tensor;

const void* pointer(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

// Tensors of 2 to 5 dimensions are (N, C, everything else) in memory, or (N, everything else, C)
// when they are channels_last in the 4-D or the 5-D sense.
struct Dense {
  at::MemoryFormat format;
  BatchNormProblem problem;

  explicit Dense(const Tensor& input) {
    format = input.suggest_memory_format();
    problem.N = input.size(0);
    problem.C = input.size(1);
    problem.H = 1;
    for (int64_t axis = 2; axis < input.dim(); ++axis) problem.H *= input.size(axis);
    problem.W = 1;
    problem.dtype = dtype_of(input);
    problem.layout = layout_of(format != at::MemoryFormat::Contiguous);
  }
};

const BatchNormKernel* pick_batch_norm(Direction direction, const BatchNormProblem& p,
                                       const Tensor& like) {
  return pick(kernel_table().batch_norm, "batch_norm", direction, p, like);
}

bool goes_to_aten(const Tensor& input) {
  if (is_own(input) && !aten_is_forced()) return false;
  require_fallback_allowed("batch_norm", input);
  return true;
}

Tensor value_or_undefined(const OptionalTensor& t) { return t ? as_accumulator(*t) : Tensor(); }
Tensor packed(const OptionalTensor& t, at::MemoryFormat format) {
  return t ? t->contiguous(format) : Tensor();
}

Tensor then_activate(const Tensor& z, const OptionalTensor& residual, Activation activation) {
  return apply_activation(residual ? z + *residual : z, activation);
}

std::tuple<Tensor, Tensor, Tensor> aten_training(const Tensor& input, const OptionalTensor& weight,
                                                 const OptionalTensor& bias,
                                                 const OptionalTensor& residual, double eps,
                                                 Activation activation) {
  auto [z, mean, invstd] = at::native_batch_norm(input, weight, bias, std::nullopt, std::nullopt,
                                                 /*training=*/true, /*momentum=*/0.0, eps);
  return {then_activate(z, residual, activation), mean, invstd.pow(-2) - eps};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_training(const Tensor& input,
                                                       const OptionalTensor& weight,
                                                       const OptionalTensor& bias,
                                                       const OptionalTensor& residual, double eps,
                                                       std::string_view activation) {
  const Activation act = activation_of(activation);
  check_residual("batch_norm", residual, input.sym_sizes(), input);
  const bool aten = goes_to_aten(input);
  if (aten && input.numel() > 0) return aten_training(input, weight, bias, residual, eps, act);
  check_batch_norm(input, weight, bias, std::nullopt, std::nullopt, /*training=*/true);
  Dense dense(input);
  dense.problem.eps = eps;
  dense.problem.residual = residual.has_value();
  dense.problem.activation = act;
  const auto statistics = input.options().dtype(accumulator_type(input));
  if (input.numel() == 0) {  // ATen divides by the number of elements here
    return {at::empty(input.sizes(), input.options(), dense.format),
            at::zeros({dense.problem.C}, statistics), at::zeros({dense.problem.C}, statistics)};
  }
  const BatchNormKernel* row = pick_batch_norm(Direction::kFprop, dense.problem, input);
  if (row == nullptr) return aten_training(input, weight, bias, residual, eps, act);
  Tensor out = at::empty(input.sizes(), input.options(), dense.format);
  Tensor mean = at::empty({dense.problem.C}, statistics);
  Tensor var = at::empty({dense.problem.C}, statistics);
  const Tensor x = input.contiguous(dense.format), r = packed(residual, dense.format);
  const Tensor w = value_or_undefined(weight), b = value_or_undefined(bias);
  BatchNormArgs args;
  args.input = x.const_data_ptr();
  args.residual = pointer(r);
  args.weight = pointer(w);
  args.bias = pointer(b);
  args.mean_out = mean.mutable_data_ptr();
  args.var_out = var.mutable_data_ptr();
  args.out = out.mutable_data_ptr();
  launch(*row, dense.problem, args, out);
  return {out, mean, var};
}

Tensor aten_inference(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      const Tensor& mean, const Tensor& var, const OptionalTensor& residual,
                      double eps, Activation activation) {
  const Tensor z = std::get<0>(at::native_batch_norm(input, weight, bias, mean, var,
                                                     /*training=*/false, /*momentum=*/0.0, eps));
  return then_activate(z, residual, activation);
}

Tensor batch_norm_inference(const Tensor& input, const OptionalTensor& weight,
                            const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                            const OptionalTensor& residual, double eps,
                            std::string_view activation) {
  const Activation act = activation_of(activation);
  check_residual("batch_norm", residual, input.sym_sizes(), input);
  if (goes_to_aten(input)) {
    return aten_inference(input, weight, bias, mean, var, residual, eps, act);
  }
  check_batch_norm(input, weight, bias, mean, var, /*training=*/false);
  Dense dense(input);
  dense.problem.eps = eps;
  dense.problem.training = false;
  dense.problem.residual = residual.has_value();
  dense.problem.activation = act;
  const BatchNormKernel* row = pick_batch_norm(Direction::kFprop, dense.problem, input);
  if (row == nullptr) return aten_inference(input, weight, bias, mean, var, residual, eps, act);
  Tensor out = at::empty(input.sizes(), input.options(), dense.format);
  if (out.numel() == 0) return out;
  const Tensor x = input.contiguous(dense.format), r = packed(residual, dense.format);
  const Tensor w = value_or_undefined(weight), b = value_or_undefined(bias);
  const Tensor m = as_accumulator(mean), v = as_accumulator(var);
  BatchNormArgs args;
  args.input = x.const_data_ptr();
  args.residual = pointer(r);
  args.weight = pointer(w);
  args.bias = pointer(b);
  args.mean_in = m.const_data_ptr();
  args.var_in = v.const_data_ptr();
  args.out = out.mutable_data_ptr();
  launch(*row, dense.problem, args, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> aten_backward(
    const Tensor& grad, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, const OptionalTensor& output, bool training, double eps,
    Activation activation, std::array<bool, 4> output_mask) {
  Tensor dz = grad;
  if (activation != Activation::kNone) {
    const Tensor x_hat = formula::normalise(input, mean, var, eps).x_hat;
    dz = formula::before_activation(grad, x_hat, weight, bias, residual, output, activation)
             .to(input.scalar_type());
  }
  // On the CPU, ATen wants statistics of the weight's type; without a weight, all of one type.
  const auto type = !input.is_cpu() ? accumulator_type(input)
                    : weight        ? weight->scalar_type()
                                    : mean.scalar_type();
  const Tensor invstd = at::rsqrt(as_accumulator(var) + eps).to(type);
  const Tensor m = mean.to(type), v = var.to(type);
  auto [dx, dw, db] =
      at::native_batch_norm_backward(dz, input, weight, m, v, m, invstd, training, eps,
                                     {output_mask[0], output_mask[1], output_mask[2]});
  // A result must not be an argument.
  const Tensor dr = !output_mask[3] ? Tensor() : dz.is_same(grad) ? dz.clone() : dz;
  return {dx, dw, db, dr};
}

void check_like_input(const char* what, const Tensor& t, const Tensor& input) {
  TORCH_CHECK(t.sizes() == input.sizes(), "batch_norm_backward: expected ", what, " of size ",
              input.sizes(), ", but got ", t.sizes());
  TORCH_CHECK(t.scalar_type() == input.scalar_type(), "batch_norm_backward: expected ", what,
              " of type ", input.scalar_type(), ", but got ", t.scalar_type());
  TORCH_CHECK(t.device() == input.device(), "batch_norm_backward: expected ", what, " on ",
              input.device(), ", but got one on ", t.device());
}

// The gradients of weight and bias come back in the weight's dtype, or the statistics'.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& grad, const Tensor& input, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, const OptionalTensor& output, bool training, double eps,
    std::string_view activation, std::array<bool, 4> output_mask) {
  check_batch_norm(input, weight, bias, std::nullopt, std::nullopt, /*training=*/true);
  TORCH_CHECK(mean.numel() == input.size(1) && var.numel() == input.size(1),
              "batch_norm_backward: mean and var should contain ", input.size(1), " elements, not ",
              mean.numel(), " and ", var.numel());
  check_like_input("a gradient", grad, input);
  if (residual) check_like_input("a residual", *residual, input);
  if (output) check_like_input("an output", *output, input);
  const Activation act = activation_of(activation);
  TORCH_CHECK(!output || derivative_from_output(act), "batch_norm_backward: the derivative of ",
              std::string(activation), " cannot be read off its output");
  if (input.numel() > 0 && goes_to_aten(input)) {
    return aten_backward(grad, input, weight, bias, mean, var, residual, output, training, eps, act,
                         output_mask);
  }
  Dense dense(input);
  dense.problem.eps = eps;
  dense.problem.training = training;
  dense.problem.residual = output_mask[3];
  dense.problem.activation = act;
  const auto parameter_type = weight ? weight->scalar_type() : mean.scalar_type();
  const auto statistics = input.options().dtype(accumulator_type(input));
  const BatchNormKernel* row =
      input.numel() > 0 ? pick_batch_norm(Direction::kDgrad, dense.problem, input) : nullptr;
  if (row == nullptr && input.numel() > 0) {
    return aten_backward(grad, input, weight, bias, mean, var, residual, output, training, eps, act,
                         output_mask);
  }
  Tensor dw = at::zeros({dense.problem.C}, statistics);
  Tensor db = at::zeros({dense.problem.C}, statistics);
  const auto like_input = [&](bool wanted) {
    return wanted ? at::empty(input.sizes(), input.options(), dense.format) : Tensor();
  };
  const Tensor dx = like_input(output_mask[0]), dr = like_input(output_mask[3]);
  if (row != nullptr) {
    const bool needs_z = act != Activation::kNone && !output;
    const Tensor x = input.contiguous(dense.format), dy = grad.contiguous(dense.format);
    const Tensor r = needs_z ? packed(residual, dense.format) : Tensor();
    const Tensor y = act != Activation::kNone ? packed(output, dense.format) : Tensor();
    const Tensor w = value_or_undefined(weight), b = value_or_undefined(bias);
    const Tensor m = as_accumulator(mean), v = as_accumulator(var);
    BatchNormArgs args;
    args.input = x.const_data_ptr();
    args.residual = pointer(r);
    args.grad = dy.const_data_ptr();
    args.output = pointer(y);
    args.weight = pointer(w);
    args.bias = pointer(b);
    args.mean_in = m.const_data_ptr();
    args.var_in = v.const_data_ptr();
    args.out = dx.defined() ? dx.mutable_data_ptr() : nullptr;
    args.grad_residual = dr.defined() ? dr.mutable_data_ptr() : nullptr;
    args.grad_weight = dw.mutable_data_ptr();
    args.grad_bias = db.mutable_data_ptr();
    launch(*row, dense.problem, args, input);
  }
  // In torch a weight of any shape will do, and its gradient has that shape.
  if (weight) dw = dw.view(weight->sizes());
  return {dx, output_mask[1] ? dw.to(parameter_type) : Tensor(),
          output_mask[2] ? db.to(parameter_type) : Tensor(), dr};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, CompositeExplicitAutograd, m) {
  m.impl("batch_norm_training", &batch_norm_training);
  m.impl("batch_norm_inference", &batch_norm_inference);
  m.impl("batch_norm_backward", &batch_norm_backward);
}
#define FASTCONV_BATCH_NORM_IMPLS(m)                     \
  m.impl("batch_norm_training", &batch_norm_training);   \
  m.impl("batch_norm_inference", &batch_norm_inference); \
  m.impl("batch_norm_backward", &batch_norm_backward);
TORCH_LIBRARY_IMPL(fastconv, CPU, m){FASTCONV_BATCH_NORM_IMPLS(m)} TORCH_LIBRARY_IMPL(fastconv,
                                                                                      CUDA, m) {
  FASTCONV_BATCH_NORM_IMPLS(m)
}

}  // namespace fastconv
