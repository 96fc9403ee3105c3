// Which row of the CUDA and Triton kernels a GPU would run, asked of a machine that has none: lines
// of problems come in, each row's refusal or expected microseconds goes out (gpu_choices.py).
#include <algorithm>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/choose.h"
#include "triton/table.h"

namespace fastconv {

void launch_triton(const char*, const Conv2dProblem&, const Conv2dArgs&, const Context&) {}
void launch_triton(const char*, const Pool2dProblem&, const Pool2dArgs&, const Context&) {}
void launch_triton(const char*, const BatchNormProblem&, const BatchNormArgs&, const Context&) {}

namespace {

template <class T>
T named(const std::string& name, std::initializer_list<T> values) {
  for (const T value : values) {
    if (name == name_of(value)) return value;
  }
  throw std::runtime_error("no such name: " + name);
}

struct Query {
  std::string op;
  Direction direction;
  Device device;
  Conv2dProblem problem;
};

// "conv2d fprop 90 132 232448 1 bfloat16 NHWC 0 0 N C H W K R S stride pad dilation (2 each) G"
Query read(const std::string& line) {
  std::istringstream in(line);
  std::string direction, dtype, layout;
  bool triton = false, relu = false;
  Query q;
  Conv2dProblem& p = q.problem;
  q.device.type = Device::Type::kCuda;
  in >> q.op >> direction;
  in >> q.device.sm_arch >> q.device.sm_count >> q.device.shared_memory_per_block >> triton;
  in >> dtype >> layout >> p.tf32 >> relu;
  in >> p.N >> p.C >> p.H >> p.W >> p.K >> p.R >> p.S;
  in >> p.stride_h >> p.stride_w >> p.pad_h >> p.pad_w >> p.dil_h >> p.dil_w >> p.G;
  if (!in) throw std::runtime_error("cannot read: " + line);
  q.direction = named(direction,
                      {Direction::kFprop, Direction::kDgrad, Direction::kWgrad, Direction::kBgrad});
  p.dtype = named(dtype, {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16});
  p.layout = p.filter_layout = named(layout, {Layout::kNCHW, Layout::kNHWC});
  p.epilogue.statistics = q.op == "conv2d_statistics";
  if (relu) {
    p.epilogue.scale = p.epilogue.shift = true;
    p.epilogue.activation = Activation::kReLU;
  }
  if (!triton) q.device.no_triton = "not asked for";
  return q;
}

void answer(const Query& q, const KernelTable& table) {
  std::vector<Candidate> candidates;
  const Conv2dKernel* chosen =
      choose(table.conv2d, q.op, q.direction, q.problem, q.device, Selection(), &candidates);
  std::cout << "chosen\t" << (chosen != nullptr ? chosen->name : "") << '\n';
  for (const Candidate& c : candidates) {
    std::cout << c.name << '\t' << c.cost_us << '\t' << c.reason << '\n';
  }
  std::cout << '\n';
}

}  // namespace
}  // namespace fastconv

int main() {
  fastconv::KernelTable table;
  fastconv::add_cuda_kernels(table);
  fastconv::add_triton_kernels(table);
  try {
    for (std::string line; std::getline(std::cin, line);) {
      fastconv::answer(fastconv::read(line), table);
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
