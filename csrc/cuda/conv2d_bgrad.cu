// Bias gradient: the sum of the output's gradient over N, P and Q for each of the K filters.
//
// A block adds up a share of the pixels, in NCHW of one filter (256 threads along neighbouring
// pixels), in NHWC of 32 filters (32 neighbouring threads, 8 pixels at a time). Threads' sums are
// paired off in a tree, blocks' sums go through the workspace: the order never changes.
#include "cuda/conv2d.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr const char* kName = "conv2d_sm80_bgrad";
constexpr int kThreads = 256;

int lanes_log2_of(const Conv2dProblem& p) { return p.layout == Layout::kNCHW ? 0 : 5; }

struct BgradParams {
  const void* grad;
  void *partials, *out;  // partials null: the block's sum is the result
  int64_t pixels, pixels_per_split, blocks;
  Strides4 res;
  int K, P, Q, lanes_log2, k_blocks;
};

template <class T>
__global__ void __launch_bounds__(kThreads) conv2d_bgrad_kernel(const BgradParams t) {
  using A = accumulator_t<T>;
  SharedCarver carver(shared_memory());
  A* sums = carver.take<A>(kThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const int lanes = 1 << t.lanes_log2;
  const int rows = kThreads >> t.lanes_log2, row = thread >> t.lanes_log2;
  for (int64_t block = blockIdx.x; block < t.blocks; block += gridDim.x) {
    const Division part = divide(block, t.k_blocks);
    const int split = static_cast<int>(part.quotient);
    const int k = part.remainder * lanes + (thread & (lanes - 1));
    const int64_t begin = split * t.pixels_per_split;
    const int64_t end = min(begin + t.pixels_per_split, t.pixels);
    A sum = 0;
    if (k < t.K) {
      const T* grad = static_cast<const T*>(t.grad) + k * t.res.c;
#pragma unroll 2
      for (int64_t i = begin + row; i < end; i += rows) {
        sum += widen(grad[offset_of(t.res, pixel_at(i, t.P, t.Q))]);
      }
    }
    sums[thread] = sum;
    for (int half = kThreads / 2; half >= lanes; half /= 2) {
      __syncthreads();
      if (thread < half) sums[thread] += sums[thread + half];
    }
    if (thread < lanes && k < t.K) {  // this thread wrote sums[thread] itself
      store_partial<T>(t.partials, t.out, t.K, split, k, sums[thread]);
    }
    __syncthreads();
  }
}

Split split_of(const Conv2dProblem& p) {
  const int64_t k_blocks = ceil_div(p.K, int64_t{1} << lanes_log2_of(p));
  return split_sum(p.N * p.P() * p.Q(), k_blocks, p.K, size_of(accumulator_of(p.dtype)));
}

void launch(const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
  const Split split = split_of(p);
  BgradParams t = {};
  t.grad = args.grad;
  t.partials = split.splits > 1 ? args.workspace : nullptr;
  t.out = args.out;
  t.pixels = p.N * p.P() * p.Q();
  t.pixels_per_split = split.items_per_split;
  t.res = dense_strides(p.layout, p.K, p.P(), p.Q());
  t.K = to_int(p.K);
  t.P = to_int(p.P());
  t.Q = to_int(p.Q());
  t.lanes_log2 = lanes_log2_of(p);
  t.k_blocks = to_int(ceil_div(p.K, int64_t{1} << t.lanes_log2));
  t.blocks = int64_t{t.k_blocks} * split.splits;
  dispatch_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    SharedCarver carver;
    carver.take<accumulator_t<T>>(kThreads);
    launch_kernel({kName, std::min(t.blocks, kMaxBlocks), kThreads, context.stream, carver.bytes()},
                  &conv2d_bgrad_kernel<T>, t);
  });
  if (split.splits > 1) {
    reduce_partials(kName, p.dtype, args.workspace, args.out, p.K, split.splits, context.stream);
  }
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_bgrad_rows(KernelTable& table) {
  Conv2dKernel row = cuda::conv2d_row(cuda::kName, Direction::kBgrad);
  row.supports = [](const Conv2dProblem& p, const Device&) {
    return cuda::refuse_beyond_int(
        {{"K", p.K + 32}, {"output height", p.P()}, {"output width", p.Q()}});
  };
  row.cost = [](const Conv2dProblem& p, const Device& device) {
    const double bytes = static_cast<double>(p.output_elements() * size_of(p.dtype));
    return cuda::expected_us(bytes, 0, 1, device);
  };
  row.workspace = [](const Conv2dProblem& p, const Device&) {
    return cuda::split_workspace(cuda::split_of(p), p.K, p.dtype);
  };
  row.launch = cuda::launch;
  table.conv2d.push_back(std::move(row));
}

}  // namespace fastconv
