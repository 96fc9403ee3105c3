// The row of Hopper's filter gradient: copies of tensors that TMA cannot read, tensor maps, the
// launch of a tile's kernel for 16-bit elements (conv2d_igemm_sm90_wgrad_kernel.h), and the sum
// over splits. float32 has a kernel and a file of its own.
#include <string>

#include "cuda/conv2d_igemm_sm90_wgrad_kernel.h"
#include "cuda/conv2d_layout.h"
#include "cuda/table.h"
#include "cuda/tensor_map.h"

namespace fastconv {
namespace cuda {
namespace {

using namespace sm90_wgrad;

// What the kernel reads: tensors of the caller, or their copies in the workspace with channels
// innermost and whole 16-byte units of them.
struct Operand {
  int64_t channels;
  bool copied;
};
Operand operand_of(const Conv2dProblem& p, int64_t channels) {
  const int64_t padded = padded_channels(channels, p.dtype);
  return {padded, p.layout != Layout::kNHWC || padded != channels};
}

struct Workspace {
  void *grad = nullptr, *input = nullptr;  // copies; null: none
  void* partials = nullptr;
  size_t bytes;

  Workspace(const Conv2dProblem& p, const Plan& plan, void* base) {
    WorkspaceCarver carve(base);
    if (operand_of(p, p.K).copied) {
      grad = carve.take(activation_copy_bytes(p.dtype, p.N, p.K, p.P() * p.Q()));
    }
    if (operand_of(p, p.C).copied) {
      input = carve.take(activation_copy_bytes(p.dtype, p.N, p.C, p.H * p.W));
    }
    if (plan.slots() > 0) partials = carve.take(plan.partial_bytes());
    bytes = carve.bytes();
  }
};

CUtensorMapDataType map_type(const Conv2dProblem& p) {
  if (p.dtype == DType::kFloat16) return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (p.dtype == DType::kBFloat16) return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  // TFLOAT32 rounds as it loads; 3xTF32 splits for itself.
  return p.tf32 ? CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

// Channels and pixels of a box. Two blocks that share one copy half of its pixels each.
struct Box {
  int channels, pixels;
};
Box box_of(DType dtype, bool shared) {
  const int step = step_pixels(size_of(dtype));
  return {step, shared ? step / kPair : step};
}

// [pixels][channels], boxes of 128 bytes of channels. Pixels behind the last are zeros: whatever
// the other operand has there (zeros too) adds nothing.
TiledMap pixels_map(const Conv2dProblem& p, const void* base, int64_t channels, bool shared) {
  const int64_t pixels = p.N * p.P() * p.Q();
  const Box box = box_of(p.dtype, shared);
  TiledMap map = {map_type(p), base, 2, {channels, pixels}, {1, channels}, {}};
  map.box[0] = box.channels;
  map.box[1] = box.pixels;
  map.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  return map;
}

Im2colMap windows_map(const Conv2dProblem& p, const void* base, int64_t channels, bool shared) {
  const Box box = box_of(p.dtype, shared);
  Im2colMap map = {map_type(p),
                   base,
                   {channels, p.W, p.H, p.N},
                   {1, channels, p.W * channels, p.H * p.W * channels},
                   {to_int(-p.pad_w), to_int(-p.pad_h)},
                   {to_int(p.pad_w - (p.S - 1) * p.dil_w), to_int(p.pad_h - (p.R - 1) * p.dil_h)},
                   {to_int(p.stride_w), to_int(p.stride_h)},
                   box.channels,
                   box.pixels};
  map.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  return map;
}

// A 1x1 filter over each pixel once: no windows, and none of their limits.
bool is_tiled(const Conv2dProblem& p) {
  return p.is_1x1() && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0;
}

Params params_of(const Conv2dProblem& p, const Plan& plan, const Conv2dArgs& args,
                 const Workspace& workspace) {
  Params t = {};
  t.conv = conv_params_of(p, args);
  t.merged = to_int(plan.groups.merged);
  t.group_channels = t.conv.c_per_group;
  t.group_filters = t.conv.k_per_group;
  t.conv.G = to_int(plan.groups.count);
  t.conv.c_per_group = to_int(plan.groups.channels);
  t.conv.k_per_group = to_int(plan.groups.filters);
  t.slots = static_cast<float*>(workspace.partials);
  t.vector = t.conv.flt.c == 1 && p.C / p.G % 4 == 0;
  t.tiled = is_tiled(p);
  t.share = plan.share;
  t.cluster = plan.cluster();
  t.k_units = to_int(plan.k_tiles / (plan.share == Share::kInput ? kPair : 1));
  t.column_units = to_int(plan.column_tiles / (plan.share == Share::kGrad ? kPair : 1));
  t.channel_chunks = to_int(plan.channel_chunks);
  t.chunks = to_int(plan.chunks);
  t.units = plan.units;
  t.work = plan.units * plan.unit_steps;
  t.steps = to_int(plan.steps);
  t.unit_steps = to_int(plan.unit_steps);
  t.worker_steps = to_int(plan.worker_steps);
  t.pieces = to_int(plan.pieces());
  t.step = pixel_step(plan.step(), t.conv.P, t.conv.Q);
  return t;
}

constexpr const char* kName = "conv2d_igemm_sm90_wgrad";

template <class Tile>
void launch_tile(const Params& t, const CUtensorMap& grad, const CUtensorMap& input,
                 int64_t workers, void* stream) {
  SharedCarver carve;
  const Memory<Tile> memory(carve);
  launch_kernel({kName, workers * t.cluster, kThreads, stream, carve.bytes(), t.cluster},
                &conv2d_igemm_sm90_wgrad_kernel<Tile>, grad, input, t);
}

template <class T>
void launch_element(const Plan& plan, const Params& t, const CUtensorMap& grad,
                    const CUtensorMap& input, void* stream) {
  const auto run = [&](auto tile) {
    launch_tile<decltype(tile)>(t, grad, input, plan.workers, stream);
  };
  if (plan.tile.rows == 64) {
    run(BlockTile<T, 64, 4>());
  } else if (plan.tile.chunks == 4) {
    run(BlockTile<T, 128, 4>());
  } else if (plan.tile.chunks == 3) {
    run(BlockTile<T, 128, 3>());
  } else if (plan.tile.chunks == 2) {
    run(BlockTile<T, 128, 2>());
  } else {
    run(BlockTile<T, 128, 1>());
  }
  launch_reduce<T>(plan, t, kName, stream);
}

void launch(const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
  const Plan plan = plan_of(p);
  const Workspace workspace(p, plan, args.workspace);
  const Params t = params_of(p, plan, args, workspace);
  const int64_t pixels = p.P() * p.Q();
  if (workspace.grad != nullptr) {
    copy_activations(kName, p.dtype, p.layout, args.grad, workspace.grad, p.N, p.K, pixels,
                     context.stream);
  }
  if (workspace.input != nullptr) {
    copy_activations(kName, p.dtype, p.layout, args.input, workspace.input, p.N, p.C, p.H * p.W,
                     context.stream);
  }
  const void* grad = workspace.grad != nullptr ? workspace.grad : args.grad;
  const void* input = workspace.input != nullptr ? workspace.input : args.input;
  const int64_t K = operand_of(p, p.K).channels, C = operand_of(p, p.C).channels;
  const bool input_shared = plan.share == Share::kInput;
  const CUtensorMap grad_map = encode(pixels_map(p, grad, K, plan.share == Share::kGrad));
  const CUtensorMap input_map = t.tiled ? encode(pixels_map(p, input, C, input_shared))
                                        : encode(windows_map(p, input, C, input_shared));
  if (p.dtype == DType::kFloat32) {
    launch_float32(plan, t, grad_map, input_map, kName, context.stream);
  } else if (p.dtype == DType::kFloat16) {
    launch_element<__half>(plan, t, grad_map, input_map, context.stream);
  } else {
    launch_element<__nv_bfloat16>(plan, t, grad_map, input_map, context.stream);
  }
}

std::string refuse_limit(const char* what, int64_t value, bool within) {
  return within ? std::string() : std::string(what) + " " + std::to_string(value);
}

std::string refuse_wgrad(const Conv2dProblem& p) {
  constexpr int64_t kLeastGroup = 4;  // below, the CUDA cores are no slower
  constexpr int64_t kMostPixels = 0x7fffffff - 2 * step_pixels(2);
  const int64_t narrowest = std::min(p.C, p.K) / p.G;
  std::string why = refuse_conv_beyond_int(p, 4 * kChunk);
  if (why.empty()) {
    why = refuse_limit("pixels", p.N * p.P() * p.Q(), p.N * p.P() * p.Q() <= kMostPixels);
  }
  if (why.empty()) {
    why = refuse_limit("channels a group", narrowest, p.G == 1 || narrowest >= kLeastGroup);
  }
  if (!why.empty()) return why;
  // Any aligned address will do here.
  const void* base = reinterpret_cast<const void*>(uintptr_t{1024});
  const int64_t K = operand_of(p, p.K).channels, C = operand_of(p, p.C).channels;
  why = refuse(pixels_map(p, base, K, false));
  if (!why.empty()) return why;
  if (is_tiled(p)) return refuse(pixels_map(p, base, C, false));
  // Beyond int the corners would wrap; far below, they are refused for what they are.
  const int64_t reach = std::max((p.R - 1) * p.dil_h, (p.S - 1) * p.dil_w);
  why = refuse_limit("the filter's reach", reach, reach <= 255);
  return why.empty() ? refuse(windows_map(p, base, C, false)) : why;
}

double cost(const Conv2dProblem& p, const Device& device) {
  const Plan plan = plan_of(p);
  // Partial sums and copies are written once and read once, most of it by kernels of their own.
  const double apart = 2.0 * static_cast<double>(Workspace(p, plan, nullptr).bytes);
  const int copies = operand_of(p, p.K).copied + operand_of(p, p.C).copied;
  const double launches = 3.0 * (1 + copies + (plan.slots() > 0));
  // The plan's cycles are those of 132 SMs.
  constexpr double kFlops = 2 * 2048;
  return gpu_us(launches, p.bytes(), plan.cycles * 132 * kFlops, kFlops, device) +
         gpu_us(0, apart, 0, kFlops, device);
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_igemm_sm90_wgrad_rows(KernelTable& table) {
  Conv2dKernel row = cuda::conv2d_row(cuda::kName, Direction::kWgrad);
  row.arch = "sm_90a";
  row.dtypes = bit(DType::kFloat32) | bit(DType::kFloat16) | bit(DType::kBFloat16);
  row.aligned = true;
  row.supports = [](const Conv2dProblem& p, const Device&) { return cuda::refuse_wgrad(p); };
  row.cost = [](const Conv2dProblem& p, const Device& device) { return cuda::cost(p, device); };
  row.workspace = [](const Conv2dProblem& p, const Device&) {
    return cuda::Workspace(p, cuda::sm90_wgrad::plan_of(p), nullptr).bytes;
  };
  row.launch = [](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
    cuda::launch(p, args, context);
  };
  table.conv2d.push_back(std::move(row));
}

}  // namespace fastconv
