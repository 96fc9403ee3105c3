// What torch's switches say of float32 on a GPU.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

#include <atomic>
#include <optional>
#include <string>

namespace fastconv {
namespace detail {

// torch names the operation by an enumerator, or once did by a string: whichever its type is.
template <class Op>
bool ask_for_conv(bool (at::Context::*allows)(std::optional<Op>) const) {
  return (at::globalContext().*allows)(Op::CONV);
}
inline bool ask_for_conv(bool (at::Context::*allows)(const std::string&) const) {
  return (at::globalContext().*allows)("conv");
}

}  // namespace detail

// Whether a convolution may round its operands to TF32 (torch.backends.cudnn.conv.fp32_precision,
// torch.backends.cudnn.allow_tf32): what ATen asks before it calls cuDNN. Asked for one operation,
// it does not mind which of the two was set last.
inline bool conv_may_use_tf32() { return detail::ask_for_conv(&at::Context::allowTF32CuDNN); }

// The same for CPU tensors, for a GPU's kernels in the emulator or in Triton's interpreter: torch's
// switch, which is on at first, does not reach those.
inline std::atomic<bool> tf32_on_cpu{false};

inline bool may_use_tf32(const at::Tensor& like) {
  if (like.scalar_type() != at::kFloat) return false;
  return like.is_cuda() ? conv_may_use_tf32() : tf32_on_cpu.load();
}

}  // namespace fastconv
