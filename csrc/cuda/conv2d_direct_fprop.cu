// Direct convolution on plain float units: any stride, padding, dilation, groups, layout and dtype.
//
// A thread keeps kFilters x kDirectPixels outputs in registers: at 4 x 4 it loads 8 values for 16
// multiply-adds. It walks the taps (r, s) outside and the channels inside, in an order that depends
// on the problem alone, so the same call gives the same bits.
#include "cuda/conv2d_direct.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr const char* kName = "conv2d_direct_sm80_fprop";
constexpr int kPixels = kDirectPixels;

// The part of the input under one output position's window.
struct Window {
  int64_t image;  // where n begins
  int h, w;       // the window's corner; far outside for a pixel past the last
};

__device__ inline Window window_at(const ConvParams& t, int64_t index) {
  if (index >= t.pixels) return {0, -0x7fffffff, 0};
  const Pixel pixel = pixel_at(index, t.P, t.Q);
  return {pixel.n * t.in.n, pixel.row * t.stride_h - t.pad_h, pixel.col * t.stride_w - t.pad_w};
}

// kVector > 1: channels are contiguous and 16-byte aligned in input and filter.
template <class T, int kFilters, int kVector>
__global__ void __launch_bounds__(kDirectThreads, 3)
    conv2d_direct_fprop_kernel(const ConvParams t, const DirectPlan plan) {
  using A = accumulator_t<T>;
  for (int64_t block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
    const DirectShare share = direct_share(plan, block, kFilters);
    if (share.channels == 0) continue;
    const int k0 = share.group * t.k_per_group + share.first_in_group;

    Window windows[kPixels];
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      windows[i] = window_at(t, share.first_pixel + i * share.pixel_step);
    }
    const T* input = static_cast<const T*>(t.input) + share.group * (t.c_per_group * t.in.c);
    // Beyond the group's last filter a thread recomputes that one and does not store it.
    const T* filter[kFilters];
#pragma unroll
    for (int j = 0; j < kFilters; ++j) {
      filter[j] = static_cast<const T*>(t.filter) + (k0 + min(j, share.channels - 1)) * t.flt.n;
    }

    A sum[kFilters][kPixels] = {};
    for (int r = 0; r < t.R; ++r) {
      for (int s = 0; s < t.S; ++s) {
        const T* x[kPixels];
        bool inside[kPixels];
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          const int h = windows[i].h + r * t.dil_h, w = windows[i].w + s * t.dil_w;
          inside[i] = within(h, t.H) && within(w, t.W);
          x[i] = input + (inside[i] ? windows[i].image + h * t.in.h + w * t.in.w : 0);
        }
        const int64_t tap = r * t.flt.h + s * t.flt.w;
        A part[kFilters][kPixels] = {};  // of one tap: a plain sum of thousands loses digits
#pragma unroll 1  // four copies of the body would take 168 registers and spill
        for (int c = 0; c < t.c_per_group; c += kVector) {
          Pack<T, kVector> f[kFilters], v[kPixels];
#pragma unroll
          for (int j = 0; j < kFilters; ++j) {
            f[j] = load_pack<T, kVector>(filter[j] + (tap + c * t.flt.c));
          }
#pragma unroll
          for (int i = 0; i < kPixels; ++i) {
            v[i] = inside[i] ? load_pack<T, kVector>(x[i] + c * t.in.c) : Pack<T, kVector>{};
          }
#pragma unroll
          for (int e = 0; e < kVector; ++e) {
#pragma unroll
            for (int j = 0; j < kFilters; ++j) {
#pragma unroll
              for (int i = 0; i < kPixels; ++i) {
                part[j][i] += widen(f[j].at[e]) * widen(v[i].at[e]);
              }
            }
          }
        }
#pragma unroll
        for (int j = 0; j < kFilters; ++j) {
#pragma unroll
          for (int i = 0; i < kPixels; ++i) sum[j][i] += part[j][i];
        }
      }
    }

#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int64_t index = share.first_pixel + i * share.pixel_step;
      if (index >= t.pixels) break;
      // Again: kept, the position would cost registers in the loops.
      const int64_t offset = offset_of(t.res, pixel_at(index, t.P, t.Q));
#pragma unroll
      for (int j = 0; j < kFilters; ++j) {
        if (j >= share.channels) break;
        store_result<T>(t.epilogue, t.out, k0 + j, offset + (k0 + j) * t.res.c, sum[j][i]);
      }
    }
  }
}

template <class T>
void launch_element(const Conv2dProblem& p, const Conv2dArgs& args, void* stream) {
  const ConvParams t = conv_params_of(p, args);
  const DirectPlan plan = direct_plan_of(p.layout, p.G, p.K / p.G, t.pixels);
  // float64 stays scalar: pairs take more than 128 registers.
  constexpr int kVector = sizeof(T) == 8 ? 1 : kPackSize<T>;
  const bool vector = t.k_per_group > 1 && t.in.c == 1 && t.flt.c == 1 &&
                      t.c_per_group % kVector == 0 && is_aligned(args.input, kPackBytes) &&
                      is_aligned(args.filter, kPackBytes);
  const auto kernel = t.k_per_group == 1 ? &conv2d_direct_fprop_kernel<T, 1, 1>
                      : vector           ? &conv2d_direct_fprop_kernel<T, kDirectChannels, kVector>
                                         : &conv2d_direct_fprop_kernel<T, kDirectChannels, 1>;
  launch_kernel({kName, std::min(plan.blocks, kMaxBlocks), kDirectThreads, stream}, kernel, t,
                plan);
}

}  // namespace
}  // namespace cuda

void add_cuda_conv2d_direct_fprop_rows(KernelTable& table) {
  Conv2dKernel row = cuda::conv2d_row(cuda::kName, Direction::kFprop);
  row.supports = [](const Conv2dProblem& p, const Device&) {
    return cuda::refuse_conv_beyond_int(p, 32 * cuda::kDirectChannels);
  };
  row.cost = [](const Conv2dProblem& p, const Device& device) {
    const cuda::DirectPlan plan =
        cuda::direct_plan_of(p.layout, p.G, p.K / p.G, p.N * p.P() * p.Q());
    return cuda::direct_us(p, plan, p.C / p.G * p.R * p.S, 0.2, device);
  };
  row.launch = [](const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
    cuda::dispatch_element(p.dtype, [&](auto element) {
      cuda::launch_element<decltype(element)>(p, args, context.stream);
    });
  };
  table.conv2d.push_back(std::move(row));
}

}  // namespace fastconv
