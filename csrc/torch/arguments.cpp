#include "torch/arguments.h"

#include <c10/util/Exception.h>
#include <c10/util/safe_numerics.h>

#include <algorithm>
#include <sstream>

namespace fastconv {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;

std::string size_text(SymIntArrayRef values) {
  std::ostringstream out;
  out << values;
  return out.str();
}

// An int or a list of one or two values stands for (height, width).
SymPair expand_pair(SymIntArrayRef values, const char* op, const char* name) {
  TORCH_CHECK(values.size() == 1 || values.size() == 2, op, ": ", name,
              " must be one int, or a tuple of one or two ints, but got ", size_text(values));
  return {values[0], values[values.size() - 1]};
}

std::string pair_text(const SymPair& pair) { return size_text({pair.data(), pair.size()}); }

// a * b + c with int64 overflow as an error. Symbolic values are taken as they are.
SymInt multiply_add(const SymInt& a, const SymInt& b, const SymInt& c, const char* what) {
  const auto x = a.maybe_as_int(), y = b.maybe_as_int(), z = c.maybe_as_int();
  if (!x || !y || !z) return a * b + c;
  int64_t product = 0;
  const bool overflow = c10::mul_overflows(*x, *y, &product);
  TORCH_CHECK(!overflow && !__builtin_add_overflow(product, *z, &product), what, " overflows: ", *x,
              " * ", *y, " + ", *z);
  return product;
}

SymInt floor_divide(const SymInt& a, const SymInt& b) {
  const auto x = a.maybe_as_int(), y = b.maybe_as_int();
  if (!x || !y) return a / b;  // symbolic: non-negative by the guards taken before
  return *x >= 0 ? *x / *y : -((-*x + *y - 1) / *y);
}

void check_tensor_size(SymIntArrayRef sizes, const char* op) {
  int64_t elements = 1;
  bool overflow = false;
  for (const SymInt& s : sizes) {
    const auto value = s.maybe_as_int();
    if (!value) return;
    overflow = overflow || c10::mul_overflows(elements, *value, &elements);
  }
  int64_t bytes = 0;
  overflow = overflow || c10::mul_overflows(elements, int64_t{8}, &bytes);
  TORCH_CHECK(!overflow, op, ": an output of size ", size_text(sizes),
              " has more elements than 63 bits can count");
}

// torch's rule for pooling: with ceil_mode the last window must still start inside the input or the
// left padding.
SymInt pooled_size(const SymInt& in, const SymInt& window, const SymInt& pad, const SymInt& stride,
                   const SymInt& dilation, bool ceil_mode) {
  const SymInt span = multiply_add(dilation, window - 1, 1, "pooling window");
  const SymInt room = multiply_add(2, pad, in, "padded size") - span;
  SymInt out = floor_divide(ceil_mode ? room + stride - 1 : room, stride) + 1;
  if (ceil_mode && (out - 1) * stride >= in + pad) out = out - 1;
  return out;
}

void check_per_channel(const at::Tensor& input, const SymInt& channels,
                       const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& mean, const OptionalTensor& var) {
  const std::array<std::pair<const char*, const OptionalTensor*>, 4> arrays = {
      {{"weight", &weight}, {"bias", &bias}, {"running_mean", &mean}, {"running_var", &var}}};
  const bool is_16_bit = input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
  std::optional<at::ScalarType> first;
  for (const auto& [name, array] : arrays) {
    if (!*array) continue;
    const at::Tensor& t = **array;
    TORCH_CHECK(t.sym_numel() == channels, "batch_norm: ", name, " should contain ", channels,
                " elements, not ", t.sym_numel(), " (size ", size_text(t.sym_sizes()), ")");
    TORCH_CHECK(t.device() == input.device(),
                "batch_norm: expected all tensors to be on the same device, but input is on ",
                input.device(), " and ", name, " is on ", t.device());
    // As in torch: all have the input's type, or all are float32 beside a 16-bit input.
    if (!first) first = t.scalar_type();
    TORCH_CHECK(t.scalar_type() == *first, "batch_norm: ", name, " has type ", t.scalar_type(),
                ", but expected scalar type ", *first, ", which the others have");
    TORCH_CHECK(*first == input.scalar_type() || (is_16_bit && *first == at::kFloat),
                "batch_norm: ", name, " has type ", t.scalar_type(),
                ", which does not go with an input of type ", input.scalar_type());
  }
}

bool dtype_is_own(const at::Tensor& t) {
  const auto type = t.scalar_type();
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

Pool2dSizes check_pool2d(const char* op, SymIntArrayRef in, SymIntArrayRef kernel_size,
                         SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                         bool ceil_mode) {
  Pool2dSizes sizes;
  sizes.window = expand_pair(kernel_size, op, "kernel_size");
  sizes.stride = stride.empty() ? sizes.window : expand_pair(stride, op, "stride");
  sizes.padding = expand_pair(padding, op, "padding");
  sizes.dilation = expand_pair(dilation, op, "dilation");
  for (const SymPair& pair : {sizes.window, sizes.stride, sizes.padding, sizes.dilation}) {
    // torch's pooling takes them as 32-bit numbers; areas of windows then fit 63 bits.
    TORCH_CHECK(pair[0] <= INT32_MAX && pair[1] <= INT32_MAX, op,
                ": value cannot be converted to type int without overflow: ", pair_text(pair));
  }
  const auto positive = [](const SymPair& p) { return p[0] > 0 && p[1] > 0; };
  TORCH_CHECK(positive(sizes.window), op, ": kernel size should be greater than zero, but got ",
              pair_text(sizes.window));
  TORCH_CHECK(positive(sizes.stride), op, ": stride should be greater than zero, but got ",
              pair_text(sizes.stride));
  TORCH_CHECK(positive(sizes.dilation), op, ": dilation should be greater than zero, but got ",
              pair_text(sizes.dilation));
  TORCH_CHECK(sizes.padding[0] >= 0 && sizes.padding[1] >= 0, op,
              ": pad must be non-negative, but got ", pair_text(sizes.padding));
  for (int axis = 0; axis < 2; ++axis) {
    const SymInt span = multiply_add(sizes.dilation[axis], sizes.window[axis] - 1, 1, op);
    TORCH_CHECK(
        sizes.padding[axis] <= span / 2, op,
        ": pad should be at most half of effective kernel size, but got pad=", sizes.padding[axis],
        ", kernel_size=", sizes.window[axis], " and dilation=", sizes.dilation[axis]);
  }

  const auto rank = static_cast<int64_t>(in.size());
  bool fits = rank == 3 || rank == 4;
  for (int64_t axis = rank == 4 ? 1 : 0; fits && axis < rank; ++axis) fits = in[axis] > 0;
  TORCH_CHECK(fits, op,
              ": Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input "
              "(non-empty 3D or 4D (batch mode) tensor expected for input), but got ",
              size_text(in));
  sizes.output.assign(in.begin(), in.end());
  for (int axis = 0; axis < 2; ++axis) {
    sizes.output[rank - 2 + axis] =
        pooled_size(in[rank - 2 + axis], sizes.window[axis], sizes.padding[axis],
                    sizes.stride[axis], sizes.dilation[axis], ceil_mode);
  }
  TORCH_CHECK(sizes.output[rank - 2] >= 1 && sizes.output[rank - 1] >= 1, op, ": Given input size ",
              size_text(in), " and kernel_size ", pair_text(sizes.window), ". Calculated output ",
              size_text(sizes.output), ". Output size is too small");
  check_tensor_size(sizes.output, op);
  return sizes;
}

}  // namespace

bool is_own(const at::Tensor& t) {
  if (!t.defined()) return false;
  const auto device = t.device().type();
  return dtype_is_own(t) && t.layout() == at::kStrided &&
         (device == at::kCPU || device == at::kCUDA || device == at::kMeta);
}

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

bool suggests_channels_last(const at::Tensor& t) {
  return t.dim() == 4 && t.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}

void check_conv2d_ranks(const at::Tensor& input, const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() >= 3, "conv2d: weight should have at least three dimensions, but got ",
              size_text(weight.sym_sizes()));
  TORCH_CHECK(weight.dim() == 4 || weight.dim() == input.dim(), "Expected ", weight.dim(),
              "-dimensional input for ", weight.dim(), "-dimensional weight ",
              size_text(weight.sym_sizes()), ", but got ", input.dim(),
              "-dimensional input of size ", size_text(input.sym_sizes()), " instead");
  TORCH_CHECK(input.dim() == 3 || input.dim() == 4,
              "Expected 3D (unbatched) or 4D (batched) input to conv2d, but got input of size: ",
              size_text(input.sym_sizes()));
  TORCH_CHECK(weight.dim() == 4,
              "conv2d: weight must be 4-dimensional (K, C / groups, R, S), but got ",
              size_text(weight.sym_sizes()));
}

Conv2dSizes check_conv2d(const at::Tensor& input, const at::Tensor& weight,
                         const OptionalTensor& bias, SymIntArrayRef stride, SymIntArrayRef padding,
                         SymIntArrayRef dilation, const SymInt& groups) {
  check_conv2d_ranks(input, weight);
  for (const at::Tensor* other : {&weight, bias ? &*bias : nullptr}) {
    if (other == nullptr) continue;
    const char* what = other == &weight ? "weight" : "bias";
    TORCH_CHECK(other->scalar_type() == input.scalar_type(), "conv2d: input type (",
                input.scalar_type(), ") and ", what, " type (", other->scalar_type(),
                ") should be the same");
    TORCH_CHECK(other->device() == input.device(),
                "conv2d: expected all tensors to be on the same device, but input is on ",
                input.device(), " and ", what, " is on ", other->device());
  }
  Conv2dSizes sizes;
  sizes.stride = expand_pair(stride, "conv2d", "stride");
  sizes.padding = expand_pair(padding, "conv2d", "padding");
  sizes.dilation = expand_pair(dilation, "conv2d", "dilation");
  sizes.groups = groups;
  TORCH_CHECK(sizes.padding[0] >= 0 && sizes.padding[1] >= 0,
              "conv2d: negative padding is not supported, but got ", pair_text(sizes.padding));
  TORCH_CHECK(sizes.stride[0] > 0 && sizes.stride[1] > 0,
              "conv2d: non-positive stride is not supported, but got ", pair_text(sizes.stride));
  TORCH_CHECK(sizes.dilation[0] > 0 && sizes.dilation[1] > 0,
              "conv2d: dilation should be greater than zero, but got ", pair_text(sizes.dilation));
  TORCH_CHECK(groups > 0, "conv2d: non-positive groups is not supported, but got ", groups);

  const auto x = input.sym_sizes();
  const auto w = weight.sym_sizes();
  TORCH_CHECK(w[0] >= groups, "Given groups=", groups, ", expected weight to be at least ", groups,
              " at dimension 0, but got weight of size ", size_text(w), " instead");
  TORCH_CHECK(w[0] % groups == 0, "Given groups=", groups, ", expected weight to be divisible by ",
              groups, " at dimension 0, but got weight of size ", size_text(w), " instead");
  TORCH_CHECK(x[1] == multiply_add(w[1], groups, 0, "conv2d: input channels"),
              "Given groups=", groups, ", weight of size ", size_text(w), ", expected input",
              size_text(x), " to have ", w[1] * groups, " channels, but got ", x[1],
              " channels instead");
  TORCH_CHECK(x[1] > 0, "conv2d: input", size_text(x), " has zero channels");
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->sym_size(0) == w[0], "Given weight of size ",
                size_text(w), ", expected bias to be 1-dimensional with ", w[0],
                " elements, but got bias of size ", size_text(bias->sym_sizes()), " instead");
  }
  sizes.output = {x[0], w[0], 0, 0};
  for (int axis = 0; axis < 2; ++axis) {
    const SymInt& window = w[2 + axis];
    TORCH_CHECK(window > 0, "conv2d: kernel size should be greater than zero, but weight has size ",
                size_text(w));
    const SymInt padded = multiply_add(2, sizes.padding[axis], x[2 + axis], "conv2d: padded size");
    const SymInt span =
        multiply_add(sizes.dilation[axis], window - 1, 1, "conv2d: dilated kernel size");
    TORCH_CHECK(padded >= span, "Calculated padded input size per channel: ", padded,
                ". Kernel size: ", span, " (axis ", 2 + axis, " of input", size_text(x),
                " and weight", size_text(w),
                "). Kernel size can't be greater than actual input size");
    sizes.output[2 + axis] = (padded - span) / sizes.stride[axis] + 1;
  }
  check_tensor_size({sizes.output.data(), 4}, "conv2d");
  return sizes;
}

Pool2dSizes check_max_pool2d(const at::Tensor& input, SymIntArrayRef kernel_size,
                             SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                             bool ceil_mode) {
  return check_max_pool2d(input.sym_sizes(), kernel_size, stride, padding, dilation, ceil_mode);
}

Pool2dSizes check_max_pool2d(SymIntArrayRef input_size, SymIntArrayRef kernel_size,
                             SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                             bool ceil_mode) {
  return check_pool2d("max_pool2d", input_size, kernel_size, stride, padding, dilation, ceil_mode);
}

Pool2dSizes check_avg_pool2d(const at::Tensor& input, SymIntArrayRef kernel_size,
                             SymIntArrayRef stride, SymIntArrayRef padding, bool ceil_mode,
                             std::optional<int64_t> divisor_override) {
  TORCH_CHECK(divisor_override.value_or(1) != 0, "avg_pool2d: divisor must be not zero, but got ",
              divisor_override.value_or(1));
  TORCH_CHECK_INDEX(input.dim() >= 3, "avg_pool2d: Expected 3D or 4D tensor, but got ",
                    size_text(input.sym_sizes()));
  const SymInt one = 1;
  return check_pool2d("avg_pool2d", input.sym_sizes(), kernel_size, stride, padding,
                      SymIntArrayRef(one), ceil_mode);
}

std::vector<SymInt> check_adaptive_avg_pool2d(const at::Tensor& input, SymIntArrayRef output_size) {
  TORCH_CHECK(output_size.size() == 2, "adaptive_avg_pool2d: output_size must be 2, but got ",
              output_size.size(), " values: ", size_text(output_size));
  TORCH_CHECK(output_size[0] >= 0 && output_size[1] >= 0,
              "adaptive_avg_pool2d: elements of output_size must be greater than or equal to 0, "
              "but received ",
              size_text(output_size));
  const int64_t rank = input.dim();
  const auto in = input.sym_sizes();
  TORCH_CHECK(rank == 3 || rank == 4, "adaptive_avg_pool2d: Expected 3D or 4D tensor, but got ",
              size_text(in));
  for (int64_t axis = rank - 2; axis < rank; ++axis) {
    TORCH_CHECK(in[axis] > 0,
                "adaptive_avg_pool2d: Expected input to have non-zero size for non-batch "
                "dimensions, but input has sizes ",
                size_text(in), " with dimension ", axis, " being empty");
  }
  std::vector<SymInt> output(in.begin(), in.end());
  output[rank - 2] = output_size[0];
  output[rank - 1] = output_size[1];
  check_tensor_size(output, "adaptive_avg_pool2d");
  return output;
}

void check_batch_norm(const at::Tensor& input, const OptionalTensor& weight,
                      const OptionalTensor& bias, const OptionalTensor& mean,
                      const OptionalTensor& var, bool training) {
  TORCH_CHECK_NOT_IMPLEMENTED(dtype_is_own(input), "\"batch_norm\" not implemented for '",
                              input.scalar_type(), "'");
  TORCH_CHECK(input.dim() >= 2, "batch_norm: expected an input of at least 2 dimensions, but got ",
              size_text(input.sym_sizes()));
  check_per_channel(input, input.sym_sizes()[1], weight, bias, mean, var);
  TORCH_CHECK(training || (mean && var),
              "batch_norm: running_mean and running_var must be given in evaluation mode");
}

void check_batched(const char* op, const at::Tensor& input) {
  TORCH_CHECK(input.dim() != 3, op, ": expected a batch, but got an input of size ",
              size_text(input.sym_sizes()));
}

void check_folded(const at::Tensor& input, const Conv2dSizes& sizes, const OptionalTensor& mean,
                  const OptionalTensor& var, const OptionalTensor& bn_weight,
                  const OptionalTensor& bn_bias, const OptionalTensor& residual) {
  const auto given = [](const OptionalTensor& t) { return t ? "given" : "missing"; };
  TORCH_CHECK(mean.has_value() == var.has_value(), "conv_bn_relu: mean and var come together, but ",
              "mean is ", given(mean), " and var ", given(var));
  TORCH_CHECK(mean || (!bn_weight && !bn_bias), "conv_bn_relu: without mean and var nothing is ",
              "normalised, but bn_weight is ", given(bn_weight), " and bn_bias ", given(bn_bias));
  check_per_channel(input, sizes.output[1], bn_weight, bn_bias, mean, var);
  check_residual("conv_bn_relu", residual, SymIntArrayRef(sizes.output.data(), 4), input);
}

void check_residual(const char* op, const OptionalTensor& residual, SymIntArrayRef size,
                    const at::Tensor& like) {
  if (!residual) return;
  TORCH_CHECK(residual->sym_sizes() == size, op, ": residual must have the output's size ",
              size_text(size), ", but got ", size_text(residual->sym_sizes()));
  TORCH_CHECK(residual->scalar_type() == like.scalar_type(), op, ": residual has type ",
              residual->scalar_type(), ", but the input has type ", like.scalar_type());
  TORCH_CHECK(residual->device() == like.device(), op, ": residual is on ", residual->device(),
              ", but the input is on ", like.device());
}

Pool2dProblem pool2d_problem(PoolKind kind, at::IntArrayRef input_size, at::IntArrayRef output_size,
                             DType dtype, bool channels_last) {
  const size_t rank = input_size.size();
  Pool2dProblem p;
  p.kind = kind;
  p.N = rank == 4 ? input_size[0] : 1;
  p.C = input_size[rank - 3];
  p.H = input_size[rank - 2];
  p.W = input_size[rank - 1];
  p.P = output_size[rank - 2];
  p.Q = output_size[rank - 1];
  p.dtype = dtype;
  p.layout = layout_of(channels_last);
  return p;
}

void set_window(Pool2dProblem& problem, const Pool2dSizes& sizes) {
  problem.R = sizes.window[0].expect_int();
  problem.S = sizes.window[1].expect_int();
  problem.stride_h = sizes.stride[0].expect_int();
  problem.stride_w = sizes.stride[1].expect_int();
  problem.pad_h = sizes.padding[0].expect_int();
  problem.pad_w = sizes.padding[1].expect_int();
  problem.dil_h = sizes.dilation[0].expect_int();
  problem.dil_w = sizes.dilation[1].expect_int();
}

}  // namespace fastconv
