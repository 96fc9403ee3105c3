// Max pooling and its gradient.
//
// fprop reads a window row by row; an element becomes the maximum when it is greater than the
// maximum so far or is NaN. Hence of equal elements the first is kept and of several NaNs the last,
// as torch does. A window of -inf alone, or of nothing, keeps the position of its first tap that is
// not above or left of the tensor.
//
// dgrad gathers: a thread takes one input position, visits the windows that cover it in ascending
// order and adds the gradients of those whose maximum it was. No atomics, one rounding, always the
// same bits.
#include <limits>
#include <string>
#include <type_traits>

#include "cuda/pool2d.h"
#include "cuda/table.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr const char* kFpropName = "max_pool2d_sm80_fprop";
constexpr const char* kDgradName = "max_pool2d_sm80_dgrad";
constexpr int kThreads = kPoolThreads;

// Here, since a host function, constexpr or not, may not be called inside a kernel.
template <class A>
constexpr A kMinusInfinity = -std::numeric_limits<A>::infinity();

// The element type of PoolIndex::kNone.
struct NoIndex {};

// A position while a window is searched: in the plane for torch's int64, else inside the window.
template <class Index>
using Position = std::conditional_t<std::is_same_v<Index, int64_t>, int64_t, int>;

struct MaxParams : PoolGeometry {
  const void *input, *index_in;  // input: or the output's gradient
  void *out, *index_out;
};

// The first tap along one axis that does not fall before the tensor, when tap 0 stands at `start`.
__device__ inline int first_tap(int start, int dilation) {
  return start >= 0 ? 0 : (dilation - 1 - start) / dilation;
}

template <class T, int kVector, class Index>
__global__ void __launch_bounds__(kThreads) max_pool2d_fprop_kernel(const MaxParams t) {
  using A = accumulator_t<T>;
  constexpr bool kKeep = !std::is_same_v<Index, NoIndex>;
  constexpr bool kFlat = std::is_same_v<Index, int64_t>;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < t.items;
       i += gridDim.x * int64_t{kThreads}) {
    const PoolItem item = item_at<kVector>(t, i, t.P, t.Q);
    const int h0 = item.row * t.stride_h - t.pad_h, w0 = item.col * t.stride_w - t.pad_w;
    const int r0 = first_tap(h0, t.dil_h), s0 = first_tap(w0, t.dil_w);
    const T* image =
        static_cast<const T*>(t.input) + (item.image * t.H * t.W * t.channels + item.channel);
    const auto position = [&](int r, int s) {
      using To = Position<Index>;
      return kFlat ? static_cast<To>(h0 + r * t.dil_h) * t.W + (w0 + s * t.dil_w)
                   : static_cast<To>(r) * t.S + s;
    };

    Pack<T, kVector> best;  // as stored: a conversion to float and back would lose a NaN's bits
    A most[kVector];
    Position<Index> where[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      most[e] = kMinusInfinity<A>;
      best.at[e] = narrow<T>(most[e]);
      where[e] = position(r0, s0);
    }
    for (int r = r0; r < t.R && h0 + r * t.dil_h < t.H; ++r) {
      const T* line = image + int64_t{h0 + r * t.dil_h} * t.W * t.channels;
      for (int s = s0; s < t.S && w0 + s * t.dil_w < t.W; ++s) {
        const auto x = load_pack<T, kVector>(line + int64_t{w0 + s * t.dil_w} * t.channels);
        const Position<Index> here = position(r, s);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const A value = widen(x.at[e]);
          const bool better = value > most[e] || value != value;
          most[e] = better ? value : most[e];
          best.at[e] = better ? x.at[e] : best.at[e];
          where[e] = better ? here : where[e];
        }
      }
    }
    store_pack(static_cast<T*>(t.out) + item.element, best);
    if constexpr (kKeep) {
      Pack<Index, kVector> kept;
#pragma unroll
      for (int e = 0; e < kVector; ++e) kept.at[e] = static_cast<Index>(where[e]);
      store_pack(static_cast<Index*>(t.index_out) + item.element, kept);
    }
  }
}

template <class T, int kVector, class Index>
__global__ void __launch_bounds__(kThreads) max_pool2d_dgrad_kernel(const MaxParams t) {
  using A = accumulator_t<T>;
  constexpr bool kFlat = std::is_same_v<Index, int64_t>;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < t.items;
       i += gridDim.x * int64_t{kThreads}) {
    const PoolItem item = item_at<kVector>(t, i, t.H, t.W);
    const Cover rows = windows_over(item.row, t.pad_h, t.stride_h, (t.R - 1) * t.dil_h + 1, t.P);
    const Cover cols = windows_over(item.col, t.pad_w, t.stride_w, (t.S - 1) * t.dil_w + 1, t.Q);
    const int64_t image = item.image * t.P * t.Q * t.channels + item.channel;

    A sum[kVector] = {};
    for (int p = rows.begin; p < rows.end; ++p) {
      const int down = item.row + t.pad_h - p * t.stride_h, r = down / t.dil_h;
      if (r * t.dil_h != down) continue;
#pragma unroll 1  // copies of the body hold every division's intermediates, and float64 spills
      for (int q = cols.begin; q < cols.end; ++q) {
        const int right = item.col + t.pad_w - q * t.stride_w, s = right / t.dil_w;
        if (s * t.dil_w != right) continue;
        const Position<Index> here =
            kFlat ? static_cast<Position<Index>>(item.row) * t.W + item.col : r * t.S + s;
        const int64_t window = image + (int64_t{p} * t.Q + q) * t.channels;
        const auto kept = load_pack<Index, kVector>(static_cast<const Index*>(t.index_in) + window);
        const auto grad = load_pack<T, kVector>(static_cast<const T*>(t.input) + window);
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          if (static_cast<Position<Index>>(kept.at[e]) == here) sum[e] += widen(grad.at[e]);
        }
      }
    }
    Pack<T, kVector> rounded;
#pragma unroll
    for (int e = 0; e < kVector; ++e) rounded.at[e] = narrow<T>(sum[e]);
    store_pack(static_cast<T*>(t.out) + item.element, rounded);
  }
}

int64_t index_bytes(PoolIndex index) {
  return index == PoolIndex::kNone       ? 0
         : index == PoolIndex::kOffset8  ? 1
         : index == PoolIndex::kOffset32 ? 4
                                         : 8;
}

// Whether every tensor of the call can be read and written in packs of `size` channels.
bool all_packs_fit(const Pool2dProblem& p, const Pool2dArgs& a, int size) {
  const int64_t index_pack = std::min<int64_t>(kPackBytes, size * index_bytes(p.index));
  return packs_fit(p, size, {a.input, a.grad, a.out}) &&
         (index_pack == 0 ||
          (is_aligned(a.index_in, index_pack) && is_aligned(a.index_out, index_pack)));
}

// Calls f(T{}, Index{}, vector) with the types of a problem; vector is a compile-time constant.
template <class F>
void dispatch_pool(const Pool2dProblem& p, const Pool2dArgs& a, F&& f) {
  dispatch_element(p.dtype, [&](auto element) {
    constexpr int kVector = kPackSize<decltype(element)>;
    const bool vector = all_packs_fit(p, a, kVector);
    const auto with_index = [&](auto index) {
      if (vector) {
        f(element, index, std::integral_constant<int, kVector>{});
      } else {
        f(element, index, std::integral_constant<int, 1>{});
      }
    };
    switch (p.index) {
      case PoolIndex::kNone:
        return with_index(NoIndex{});
      case PoolIndex::kOffset8:
        return with_index(uint8_t{});
      case PoolIndex::kOffset32:
        return with_index(int32_t{});
      case PoolIndex::kFlatIndex64:
        return with_index(int64_t{});
    }
  });
}

void launch_fprop(const Pool2dProblem& p, const Pool2dArgs& a, const Context& context) {
  dispatch_pool(p, a, [&](auto element, auto index, auto vector) {
    MaxParams t = {};
    set_geometry(t, p, vector);
    t.input = a.input;
    t.out = a.out;
    t.index_out = a.index_out;
    t.items = p.output_elements() / vector;
    launch_kernel(
        {kFpropName, blocks_for(t.items, kThreads), kThreads, context.stream},
        &max_pool2d_fprop_kernel<decltype(element), decltype(vector)::value, decltype(index)>, t);
  });
}

void launch_dgrad(const Pool2dProblem& p, const Pool2dArgs& a, const Context& context) {
  dispatch_pool(p, a, [&](auto element, auto index, auto vector) {
    if constexpr (!std::is_same_v<decltype(index), NoIndex>) {
      MaxParams t = {};
      set_geometry(t, p, vector);
      t.input = a.grad;
      t.index_in = a.index_in;
      t.out = a.out;
      t.items = p.input_elements() / vector;
      launch_kernel(
          {kDgradName, blocks_for(t.items, kThreads), kThreads, context.stream},
          &max_pool2d_dgrad_kernel<decltype(element), decltype(vector)::value, decltype(index)>, t);
    }
  });
}

Pool2dKernel dgrad_row() {
  Pool2dKernel row = pool2d_row(kDgradName, "max_pool2d", Direction::kDgrad, launch_dgrad);
  row.supports = [](const Pool2dProblem& p, const Device&) {
    return p.index == PoolIndex::kNone ? "the positions of the maxima were not kept"
                                       : refuse_pool_beyond_int(p);
  };
  return row;
}

}  // namespace
}  // namespace cuda

void add_cuda_max_pool2d_rows(KernelTable& table) {
  table.pool2d.push_back(
      cuda::pool2d_row(cuda::kFpropName, "max_pool2d", Direction::kFprop, cuda::launch_fprop));
  table.pool2d.push_back(cuda::dgrad_row());
}

}  // namespace fastconv
