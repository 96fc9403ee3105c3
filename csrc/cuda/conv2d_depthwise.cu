// The rows of depthwise fprop and dgrad: one kernel a layout.
#include "cuda/conv2d_depthwise.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

Conv2dKernel depthwise_row(const char* name, Direction direction) {
  const bool backward = direction == Direction::kDgrad;
  Conv2dKernel row = conv2d_row(name, direction);
  row.supports = [backward](const Conv2dProblem& p, const Device& device) {
    // One channel in all is what conv2d_small_channel is for: it reads the input once.
    if (!backward && p.G == 1) return std::string("1 group");
    if (p.C != p.G) return std::to_string(p.C / p.G) + " channels a group, not 1";
    std::string why = refuse_conv_beyond_int(p, 32 * kPackBytes);
    if (!why.empty()) return why;
    return p.layout == Layout::kNCHW ? depthwise_nchw_supports(p, backward, device)
                                     : depthwise_nhwc_supports(p, device);
  };
  row.cost = [backward](const Conv2dProblem& p, const Device& device) {
    // A gradient of a strided convolution multiplies the zeros between, too.
    const double zeros = backward ? static_cast<double>(p.stride_h * p.stride_w) : 1.0;
    return expected_us(p.bytes(), p.flops() * zeros, 0.3, device);
  };
  row.launch = [name, backward](const Conv2dProblem& p, const Conv2dArgs& args,
                                const Context& context) {
    const auto launch = p.layout == Layout::kNCHW ? depthwise_nchw_launch : depthwise_nhwc_launch;
    launch(name, p, args, backward, context.stream);
  };
  return row;
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_depthwise_rows(KernelTable& table) {
  table.conv2d.push_back(cuda::depthwise_row("conv2d_depthwise_sm80_fprop", Direction::kFprop));
  table.conv2d.push_back(cuda::depthwise_row("conv2d_depthwise_sm80_dgrad", Direction::kDgrad));
}

}  // namespace fastconv
