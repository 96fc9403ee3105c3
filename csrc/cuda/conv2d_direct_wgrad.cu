// Filter gradient of any convolution:
//   dw[k,c,r,s] = sum over n, p, q of dy[n,p,q,k] * x[n, p*stride_h - pad_h + r*dil_h, ..., c].
//
// A block takes one tap (r, s) of 4 filters by 4 channels of a group and a share of the pixels; a
// thread adds up every 128th (of few pixels every 32nd) in 16 registers, 8 loads for 16
// multiply-adds. The block then adds its threads' sums in the order of the threads.
#include "cuda/conv2d.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr const char* kName = "conv2d_direct_sm80_wgrad";
constexpr int kTile = 4;              // filters, and channels, of a block
constexpr int kSums = kTile * kTile;  // of a thread
constexpr int kPiece = kSums;         // values a thread adds up of the block's
constexpr int kMaxThreads = 128;      // 32 where the pixels are few
static_assert(kMaxThreads % kSums == 0 && kPiece == kSums,
              "threads * kSums values in pieces of kPiece: one piece a thread");

struct WgradPlan {
  void* partials;  // null: the block's sum is the result
  int64_t blocks, pixels_per_split, results;
  int k_tiles, c_tiles;  // a group
};

template <class A>
struct Shared {
  A *sums, *pieces;  // [kSums][threads], [kSums][threads / kSums]
  int64_t bytes;
  FASTCONV_HOST_DEVICE Shared(SharedCarver carve, int threads)
      : sums(carve.take<A>(kSums * threads)),
        pieces(carve.take<A>(threads)),
        bytes(carve.bytes()) {}
};

// Adds up each of the 16 sums over the block; thread i < 16 gets sum i.
template <class A>
__device__ inline A add_up(const Shared<A>& shared, const A (&sum)[kTile][kTile]) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
#pragma unroll
  for (int i = 0; i < kSums; ++i) shared.sums[i * threads + thread] = sum[i / kTile][i % kTile];
  __syncthreads();
  A piece = 0;
  for (int i = 0; i < kPiece; ++i) piece += shared.sums[thread * kPiece + i];
  shared.pieces[thread] = piece;
  __syncthreads();
  A total = 0;
  if (thread < kSums) {
    const int pieces = threads / kSums;
    for (int i = 0; i < pieces; ++i) total += shared.pieces[thread * pieces + i];
  }
  return total;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    conv2d_direct_wgrad_kernel(const ConvParams t, const WgradPlan plan) {
  using A = accumulator_t<T>;
  const int threads = static_cast<int>(blockDim.x);
  const Shared<A> shared(SharedCarver(shared_memory()), threads);
  for (int64_t block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    const Division by_tap = divide(block, t.R * t.S);
    const Division by_c = divide(by_tap.quotient, plan.c_tiles);
    const Division by_k = divide(by_c.quotient, plan.k_tiles);
    const Division by_group = divide(by_k.quotient, t.G);
    const int r = by_tap.remainder / t.S, s = by_tap.remainder - r * t.S;
    const int k0 = by_k.remainder * kTile, c0 = by_c.remainder * kTile;
    const int group = by_group.remainder;
    const int split = static_cast<int>(by_group.quotient);

    // Beyond a group's last filter or channel a thread adds up that one again.
    int64_t k_offset[kTile], c_offset[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      k_offset[i] = (group * t.k_per_group + min(k0 + i, t.k_per_group - 1)) * t.res.c;
      c_offset[i] = (group * t.c_per_group + min(c0 + i, t.c_per_group - 1)) * t.in.c;
    }
    A sum[kTile][kTile] = {};
    const int64_t begin = split * plan.pixels_per_split;
    const int64_t end = min(begin + plan.pixels_per_split, t.pixels);
#pragma unroll 1
    for (int64_t i = begin + threadIdx.x; i < end; i += threads) {
      const Pixel at = pixel_at(i, t.P, t.Q);
      const int h = at.row * t.stride_h - t.pad_h + r * t.dil_h;
      const int w = at.col * t.stride_w - t.pad_w + s * t.dil_w;
      if (!within(h, t.H) || !within(w, t.W)) continue;
      const T* dy = static_cast<const T*>(t.grad) + offset_of(t.res, at);
      const T* x = static_cast<const T*>(t.input) + offset_of(t.in, {at.n, h, w});
      A g[kTile], v[kTile];
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        g[j] = widen(dy[k_offset[j]]);
        v[j] = widen(x[c_offset[j]]);
      }
#pragma unroll
      for (int k = 0; k < kTile; ++k) {
#pragma unroll
        for (int c = 0; c < kTile; ++c) sum[k][c] += g[k] * v[c];
      }
    }

    const A total = add_up(shared, sum);
    const int k = k0 + static_cast<int>(threadIdx.x) / kTile;
    const int c = c0 + static_cast<int>(threadIdx.x) % kTile;
    if (threadIdx.x < kSums && k < t.k_per_group && c < t.c_per_group) {
      const int64_t at =
          (group * t.k_per_group + k) * t.flt.n + c * t.flt.c + r * t.flt.h + s * t.flt.w;
      store_partial<T>(plan.partials, t.out, plan.results, split, at, total);
    }
    // The next block's first stores meet no reader: the second barrier lies between.
  }
}

int64_t blocks_a_split(const Conv2dProblem& p) {
  return p.G * ceil_div(p.K / p.G, kTile) * ceil_div(p.C / p.G, kTile) * p.R * p.S;
}

Split split_of(const Conv2dProblem& p) {
  return split_sum(p.N * p.P() * p.Q(), blocks_a_split(p), p.filter_elements(),
                   size_of(accumulator_of(p.dtype)));
}

void launch(const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
  const Split split = split_of(p);
  const ConvParams t = conv_params_of(p, args);
  WgradPlan plan = {};
  plan.partials = split.splits > 1 ? args.workspace : nullptr;
  plan.pixels_per_split = split.items_per_split;
  plan.results = p.filter_elements();
  plan.k_tiles = to_int(ceil_div(t.k_per_group, kTile));
  plan.c_tiles = to_int(ceil_div(t.c_per_group, kTile));
  plan.blocks = blocks_a_split(p) * split.splits;
  const int threads = split.items_per_split <= 256 ? 32 : kMaxThreads;
  dispatch_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t shared_bytes = Shared<accumulator_t<T>>(SharedCarver(), threads).bytes;
    launch_kernel({kName, std::min(plan.blocks, kMaxBlocks), threads, context.stream, shared_bytes},
                  &conv2d_direct_wgrad_kernel<T>, t, plan);
  });
  if (split.splits > 1) {
    reduce_partials(kName, p.dtype, args.workspace, args.out, plan.results, split.splits,
                    context.stream);
  }
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_direct_wgrad_rows(KernelTable& table) {
  Conv2dKernel row = cuda::conv2d_row(cuda::kName, Direction::kWgrad);
  row.supports = [](const Conv2dProblem& p, const Device&) {
    return cuda::refuse_conv_beyond_int(p, cuda::kTile);
  };
  row.cost = [](const Conv2dProblem& p, const Device& device) {
    // A position and two divisions for every 16 multiply-adds.
    const int64_t blocks = cuda::blocks_a_split(p);
    const double flops =
        2.0 * static_cast<double>(blocks * cuda::kSums) * static_cast<double>(p.N * p.P() * p.Q());
    return cuda::expected_us(p.bytes(), flops, 0.06,
                             cuda::busy_part(device, blocks * cuda::split_of(p).splits, 4));
  };
  row.workspace = [](const Conv2dProblem& p, const Device&) {
    return cuda::split_workspace(cuda::split_of(p), p.filter_elements(), p.dtype);
  };
  row.launch = cuda::launch;
  table.conv2d.push_back(std::move(row));
}

}  // namespace fastconv
