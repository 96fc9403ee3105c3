// BatchNorm, the residual and the activation behind it, and their gradients.
//
// Two sums a channel first: the moments of the input (fprop, training) or the sums of dz and of
// dz * (input - mean) (dgrad), where dz = grad * activation'(z) is computed on the way. Blocks sum
// slices of the data, a small kernel joins the slices and makes each channel's few coefficients,
// and a last one computes every element from them. Inference is the last one alone. A residual and
// an activation are one tensor more to read, no launch more.
//
// Rows (NHWC): a warp spans up to 32 packs of channels of one row and each thread keeps its
// channels. Planes (NCHW): a block has one channel and its threads split the plane's packs.
#include <cmath>
#include <string>
#include <type_traits>

#include "cuda/batch_norm.h"
#include "cuda/batch_norm_sums.h"
#include "cuda/limits.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr const char* kFpropName = "batch_norm_sm80_fprop";
constexpr const char* kDgradName = "batch_norm_sm80_dgrad";
constexpr int kThreads = kNormThreads;

// ---- The second step -----------------------------------------------------------------------

// Blocks that an SM shall have room for; 0 leaves that to ptxas, which now and then spills a
// register to have one more.
template <class T, Tail kTail>
constexpr int kRowBlocks = kTail == Tail::kNone && std::is_same_v<T, double> ? 4 : 0;
template <Tail kTail>
constexpr int kPlaneBlocks = kTail == Tail::kNone ? 0 : 4;

// Rows: a thread keeps its channels' coefficients over several rows.
template <class T, int kVector, bool kDgrad, Tail kTail>
__global__ void __launch_bounds__(kThreads, kRowBlocks<T, kTail>)
    batch_norm_rows_kernel(const NormParams t) {
  const int lanes = 1 << t.lanes_log2, rows = kThreads >> t.lanes_log2;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int row_lane = static_cast<int>(threadIdx.x) >> t.lanes_log2;
  for (int64_t block = blockIdx.x; block < t.blocks; block += gridDim.x) {
    const Division part = divide(block, t.groups);
    const int c0 = (part.remainder * lanes + lane) * kVector;
    if (c0 >= t.C) continue;
    Coefficients<accumulator_t<T>, kDgrad, kTail> k[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) k[e].load(t, c0 + e);
    const int64_t begin = part.quotient * t.rows_of_block;
    const int64_t end = min(begin + t.rows_of_block, t.extent);
#pragma unroll 1
    for (int64_t row = begin + row_lane; row < end; row += rows) {
      second_step<T, kVector, kDgrad, kTail>(t, row * t.C + c0,
                                             [&](int e) -> const auto& { return k[e]; });
    }
  }
}

// Planes: a thread takes one pack of the whole tensor. With planes of 7 x 7 a pack may end in the
// next one: its elements then go one by one, from L1, as those of a last pack that is not full.
// Planes are no smaller than a pack, so that none spans three.
template <class T, int kVector, bool kDgrad, Tail kTail>
__global__ void __launch_bounds__(kThreads, kPlaneBlocks<kTail>)
    batch_norm_planes_kernel(const NormParams t) {
  const int64_t elements = t.extent * t.C;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < t.blocks;
       i += gridDim.x * int64_t{kThreads}) {
    const int64_t first = i * kVector;
    // A plane may be longer than 2^31; then there are few of them, and the division is no matter.
    const bool small = t.plane <= 0x7fffffff;
    const int64_t plane =
        small ? divide(first, static_cast<int>(t.plane)).quotient : first / t.plane;
    const int c = divide(plane, t.C).remainder;
    const int64_t here = (plane + 1) * t.plane - first;  // elements of channel c from `first` on
    Coefficients<accumulator_t<T>, kDgrad, kTail> k;
    k.load(t, c);
    const auto channel = [&](int) -> const auto& { return k; };
    if (kVector == 1 || (here >= kVector && first + kVector <= elements)) {
      second_step<T, kVector, kDgrad, kTail>(t, first, channel);
      continue;
    }
    const int count = static_cast<int>(min(int64_t{kVector}, elements - first));
#pragma unroll 1
    for (int e = 0; e < count; ++e) {
      if (e == here) k.load(t, c + 1 < t.C ? c + 1 : 0);
      second_step<T, 1, kDgrad, kTail>(t, first + e, channel);
    }
  }
}

// ---- Launches ------------------------------------------------------------------------------

NormParams parameters_of(const BatchNormProblem& p, const BatchNormArgs& a,
                         const BatchNormPlan& plan, int vector) {
  NormParams t = {};
  t.input = a.input;
  t.grad = a.grad;
  const bool activates = p.activation != Activation::kNone;
  t.beside = a.residual;
  if (a.grad != nullptr) {
    // Without an activation the derivative is 1, and neither z nor the output matters.
    t.from_output = !activates || (a.output != nullptr && derivative_from_output(p.activation));
    t.beside = !activates ? nullptr : t.from_output ? a.output : a.residual;
  }
  t.weight = a.weight;
  t.bias = a.bias;
  t.mean_in = a.mean_in;
  t.var_in = a.var_in;
  t.out = a.out;
  t.grad_residual = a.grad_residual;
  t.mean_out = a.mean_out;
  t.var_out = a.var_out;
  t.grad_weight = a.grad_weight;
  t.grad_bias = a.grad_bias;
  if (a.workspace != nullptr) {
    double* sums = static_cast<double*>(a.workspace);
    t.first = sums;
    t.second = sums + plan.sums();
    t.pivot = sums + 2 * plan.sums();
    t.coefficients = sums + 2 * plan.sums() + plan.C;
  }
  t.extent = plan.extent;
  t.per_slice = plan.per_slice;
  t.plane_packs = plan.HW / vector;
  t.plane = plan.HW;
  t.slices = static_cast<int>(plan.slices);
  t.C = static_cast<int>(plan.C);
  const int packs = t.C / vector;
  while (t.lanes_log2 < 5 && (1 << t.lanes_log2) < packs) ++t.lanes_log2;
  t.groups = (packs + (1 << t.lanes_log2) - 1) >> t.lanes_log2;
  t.eps = p.eps;
  t.slope = p.slope;
  t.activation = p.activation;
  t.training = p.training;
  return t;
}

template <class T, int kVector, bool kDgrad, Tail kTail>
void launch_sums(const char* name, const BatchNormPlan& plan, NormParams t, void* stream) {
  using A = accumulator_t<T>;
  t.blocks = plan.slices * (plan.by_rows ? t.groups : t.C);
  const int values = plan.by_rows ? kVector : 1;
  const int64_t shared =
      SharedSums<SumType<A, kDgrad>, kDgrad>(SharedCarver(), kThreads * values).bytes;
  launch_kernel({name, std::min(t.blocks, kMaxBlocks), kThreads, stream, shared},
                plan.by_rows ? &batch_norm_sums_of_rows_kernel<T, kVector, kDgrad, kTail>
                             : &batch_norm_sums_of_planes_kernel<T, kVector, kDgrad, kTail>,
                t);
  SharedCarver carve;
  carve.take<double>(kThreads);
  t.blocks = (plan.C + kJoinedChannels - 1) / kJoinedChannels;
  launch_kernel({name, t.blocks, kThreads, stream, carve.bytes()},
                &batch_norm_join_kernel<A, kDgrad>, t);
}

template <class T, int kVector, bool kDgrad, Tail kTail>
void launch_second_step(const char* name, const BatchNormPlan& plan, NormParams t, void* stream) {
  if (!plan.by_rows) {
    t.blocks = (plan.extent * plan.C + kVector - 1) / kVector;
    launch_kernel({name, blocks_for(t.blocks, kThreads), kThreads, stream},
                  &batch_norm_planes_kernel<T, kVector, kDgrad, kTail>, t);
    return;
  }
  // 8 rows a thread, or 2 while that leaves fewer threads than an H200 holds (270,000).
  const int64_t row_lanes = kThreads >> t.lanes_log2;
  const bool large = plan.extent * plan.C / kVector >= 8 * 270000;
  t.rows_of_block = row_lanes * (large ? 8 : 2);
  t.blocks = (plan.extent + t.rows_of_block - 1) / t.rows_of_block * t.groups;
  launch_kernel({name, std::min(t.blocks, kMaxBlocks), kThreads, stream},
                &batch_norm_rows_kernel<T, kVector, kDgrad, kTail>, t);
}

// Calls f(vector, tail) with compile-time constants: packs, or elements one by one, which only what
// packs cannot take goes through, and which has no code of its own for ReLU.
template <int kPack, class F>
void dispatch(bool packs, Tail tail, F&& f) {
  const auto with = [&](auto vector) {
    if (tail == Tail::kNone) {
      f(vector, std::integral_constant<Tail, Tail::kNone>{});
      return;
    }
    if constexpr (decltype(vector)::value > 1) {
      if (tail == Tail::kReLU) {
        f(vector, std::integral_constant<Tail, Tail::kReLU>{});
        return;
      }
    }
    f(vector, std::integral_constant<Tail, Tail::kAny>{});
  };
  if (packs) {
    with(std::integral_constant<int, kPack>{});
  } else {
    with(std::integral_constant<int, 1>{});
  }
}

template <bool kDgrad>
void launch(const BatchNormProblem& p, const BatchNormArgs& a, const Context& context) {
  if (p.elements() == 0) return;
  const char* name = kDgrad ? kDgradName : kFpropName;
  const BatchNormPlan plan(p);
  const bool activates = p.activation != Activation::kNone;
  const bool residual = (kDgrad ? a.grad_residual : a.residual) != nullptr;
  const Tail active = p.activation == Activation::kReLU ? Tail::kReLU
                      : activates                       ? Tail::kAny
                                                        : Tail::kNone;
  // dgrad's first step writes the residual's gradient, which is dz, and the second reads that
  // instead of all that dz is made of. Without an activation the first has nothing to add, so that
  // its sums have the same bits whether that gradient is wanted or not.
  const bool written = kDgrad && residual && activates;
  const Tail sums_tail = kDgrad ? active : Tail::kNone;
  const Tail elements_tail = written ? Tail::kNone : residual && !activates ? Tail::kAny : active;
  dispatch_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kPack = kPackSize<T>;
    bool aligned = true;
    for (const void* tensor :
         {a.input, a.residual, a.grad, a.output, static_cast<const void*>(a.out),
          static_cast<const void*>(a.grad_residual)}) {
      aligned = aligned && is_aligned(tensor, kPackBytes);
    }
    const bool whole = aligned && (plan.by_rows ? plan.C : plan.HW) % kPack == 0;
    const bool packs = plan.by_rows ? whole : aligned && plan.HW >= kPack;
    const auto sums = [&](auto vector, auto tail) {
      const NormParams t = parameters_of(p, a, plan, vector);
      launch_sums<T, vector, kDgrad, kDgrad ? tail : Tail::kNone>(name, plan, t, context.stream);
    };
    const auto elements = [&](auto vector, auto tail) {
      NormParams t = parameters_of(p, a, plan, vector);
      if (written) t.grad = a.grad_residual;
      launch_second_step<T, vector, kDgrad, tail>(name, plan, t, context.stream);
    };
    if (kDgrad || p.training) dispatch<kPack>(whole, sums_tail, sums);
    if (a.out == nullptr && (written || !residual)) return;
    dispatch<kPack>(packs, elements_tail, elements);
  });
}

BatchNormKernel row_of(const char* name, Direction direction) {
  BatchNormKernel row;
  row.name = name;
  row.op = "batch_norm";
  row.direction = direction;
  row.backend = Backend::kCuda;
  row.arch = "sm_80";
  row.dtypes = kAllDTypes;
  row.layouts = kAllLayouts;
  row.supports = [](const BatchNormProblem& p, const Device&) {
    return refuse_beyond_int({{"C", p.C + 32 * kPackBytes}});
  };
  row.cost = [direction](const BatchNormProblem& p, const Device& device) {
    const bool sums = direction == Direction::kDgrad || p.training;
    return expected_us(p.bytes() * (sums ? 1.5 : 1), 0, 1, device) + (sums ? 6 : 0);
  };
  row.workspace = [direction](const BatchNormProblem& p, const Device&) -> size_t {
    if (direction == Direction::kFprop && !p.training) return 0;
    return BatchNormPlan(p).workspace();
  };
  row.launch = direction == Direction::kFprop ? launch<false> : launch<true>;
  return row;
}

}  // namespace
}  // namespace cuda

void add_cuda_batch_norm_rows(KernelTable& table) {
  table.batch_norm.push_back(cuda::row_of(cuda::kFpropName, Direction::kFprop));
  table.batch_norm.push_back(cuda::row_of(cuda::kDgradName, Direction::kDgrad));
}

}  // namespace fastconv
