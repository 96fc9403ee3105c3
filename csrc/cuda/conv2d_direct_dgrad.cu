// Input gradient of any convolution. Each input position gathers from the windows that cover it,
// so there are no atomics and the order of a sum depends on the problem alone:
//   dx[n,h,w,c] = sum over r, s, k of filter[k,c,r,s] * dy[n,p,q,k]
//   where p * stride_h = h + pad_h - r * dil_h, and likewise q; taps that leave a remainder drop
//   out.
#include "cuda/conv2d_direct.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr const char* kName = "conv2d_direct_sm80_dgrad";
constexpr int kPixels = kDirectPixels;

// One input position, counted from the padding's edge.
struct Target {
  int64_t image;  // where n begins in the gradient of the output
  int h, w;       // far outside for a position past the last
};

__device__ inline Target target_at(const ConvParams& t, int64_t index, int64_t positions) {
  if (index >= positions) return {0, -1, -1};
  const Pixel at = pixel_at(index, t.H, t.W);
  return {at.n * t.res.n, at.row + t.pad_h, at.col + t.pad_w};
}

template <class T, int kChannels>
__global__ void __launch_bounds__(kDirectThreads, 3)
    conv2d_direct_dgrad_kernel(const ConvParams t, const DirectPlan plan) {
  using A = accumulator_t<T>;
  for (int64_t block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    const DirectShare share = direct_share(plan, block, kChannels);
    if (share.channels == 0) continue;

    Target targets[kPixels];
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      targets[i] = target_at(t, share.first_pixel + i * share.pixel_step, plan.pixels);
    }
    const int k0 = share.group * t.k_per_group;
    const T* grad = static_cast<const T*>(t.grad) + k0 * t.res.c;
    // Beyond the group's last channel a thread recomputes that one and does not store it.
    const T* filter[kChannels];
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      const int c = share.first_in_group + min(j, share.channels - 1);
      filter[j] = static_cast<const T*>(t.filter) + (k0 * t.flt.n + c * t.flt.c);
    }

    A sum[kChannels][kPixels] = {};
    for (int r = 0; r < t.R; ++r) {
      for (int s = 0; s < t.S; ++s) {
        const T* y[kPixels];
        bool inside[kPixels];
        bool any = false;
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          const int p = window_starting_at(targets[i].h - r * t.dil_h, t.stride_h, t.P);
          const int q = window_starting_at(targets[i].w - s * t.dil_w, t.stride_w, t.Q);
          inside[i] = p >= 0 && q >= 0;
          y[i] = grad + (inside[i] ? targets[i].image + p * t.res.h + q * t.res.w : 0);
          any = any || inside[i];
        }
        if (!any) continue;
        const int64_t tap = r * t.flt.h + s * t.flt.w;
        A part[kChannels][kPixels] = {};  // of one tap: a plain sum of thousands loses digits
#pragma unroll 1
        for (int k = 0; k < t.k_per_group; ++k) {
          A f[kChannels], v[kPixels];
#pragma unroll
          for (int j = 0; j < kChannels; ++j) f[j] = widen(filter[j][tap + k * t.flt.n]);
#pragma unroll
          for (int i = 0; i < kPixels; ++i) v[i] = inside[i] ? widen(y[i][k * t.res.c]) : A(0);
#pragma unroll
          for (int j = 0; j < kChannels; ++j) {
#pragma unroll
            for (int i = 0; i < kPixels; ++i) part[j][i] += f[j] * v[i];
          }
        }
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
#pragma unroll
          for (int i = 0; i < kPixels; ++i) sum[j][i] += part[j][i];
        }
      }
    }

#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int64_t index = share.first_pixel + i * share.pixel_step;
      if (index >= plan.pixels) break;
      const int c0 = share.group * t.c_per_group + share.first_in_group;
      const int64_t offset = offset_of(t.in, pixel_at(index, t.H, t.W)) + c0 * t.in.c;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        if (j >= share.channels) break;
        static_cast<T*>(t.out)[offset + j * t.in.c] = narrow<T>(sum[j][i]);
      }
    }
  }
}

template <class T>
void launch_element(const Conv2dProblem& p, const Conv2dArgs& args, void* stream) {
  const ConvParams t = conv_params_of(p, args);
  const DirectPlan plan = direct_plan_of(p.layout, p.G, p.C / p.G, p.N * p.H * p.W);
  const auto kernel = t.c_per_group == 1 ? &conv2d_direct_dgrad_kernel<T, 1>
                                         : &conv2d_direct_dgrad_kernel<T, kDirectChannels>;
  launch_kernel({kName, std::min(plan.blocks, kMaxBlocks), kDirectThreads, stream}, kernel, t,
                plan);
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_direct_dgrad_rows(KernelTable& table) {
  Conv2dKernel row = cuda::conv2d_row(cuda::kName, Direction::kDgrad);
  row.supports = [](const Conv2dProblem& p, const Device&) {
    return cuda::refuse_conv_beyond_int(p, 32 * cuda::kDirectChannels);
  };
  row.cost = [](const Conv2dProblem& p, const Device& device) {
    const cuda::DirectPlan plan = cuda::direct_plan_of(p.layout, p.G, p.C / p.G, p.N * p.H * p.W);
    // A strided window meets one position in stride_h * stride_w; each tap costs two divisions.
    const int64_t taps = cuda::ceil_div(p.R * p.S, p.stride_h * p.stride_w);
    return cuda::direct_us(p, plan, p.K / p.G * taps, 0.1, device);
  };
  row.launch = [](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
    cuda::dispatch_element(p.dtype, [&](auto element) {
      cuda::launch_element<decltype(element)>(p, args, context.stream);
    });
  };
  table.conv2d.push_back(std::move(row));
}

}  // namespace fastconv
