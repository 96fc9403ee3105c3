// Depthwise convolution in NCHW: a block holds the patches under its output tiles, and their
// filters, in shared memory.
//
// A thread computes 8 outputs, one below the other; neighbouring threads are neighbouring columns.
// A block has up to 128 threads: up to 32 columns by up to 4 such strips of rows, and of planes (an
// image's channel) so small that threads are left, several. With stride and dilation 1 a thread
// takes three rows of the filter at once: 10 values and 3 weights for 24 multiply-adds.
#include <string>

#include "cuda/conv2d_depthwise.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr int kMaxThreads = 128;
constexpr int kBlocksPerSm = 8;  // 64 registers a thread; ptxas alone spills a few to fit more
constexpr int kDown = 8;         // outputs of a thread
constexpr int kTogether = 3;     // filter rows taken at once
constexpr int64_t kBudget = 48 * 1024;  // bytes of shared memory that need no opt-in

// How outputs are laid on threads.
struct Tiling {
  int columns_log2, strips_log2, planes_log2;  // threads: columns fastest
  int tiles_h, tiles_w;                        // of a plane
  int patch_rows, patch_columns;
  int64_t planes;  // N * channels
  int64_t blocks;

  FASTCONV_HOST_DEVICE int columns() const { return 1 << columns_log2; }
  FASTCONV_HOST_DEVICE int rows() const { return kDown << strips_log2; }
  FASTCONV_HOST_DEVICE int block_planes() const { return 1 << planes_log2; }
  FASTCONV_HOST_DEVICE int threads() const {
    return 1 << (columns_log2 + strips_log2 + planes_log2);
  }
};

template <class A>
struct Shared {
  A *patches, *filters;  // [planes][patch_rows][patch_columns], [planes][R * S]
  int64_t bytes;
  FASTCONV_HOST_DEVICE Shared(SharedCarver carve, const Tiling& t, int taps)
      : patches(carve.take<A>(int64_t{t.patch_rows} * t.patch_columns << t.planes_log2)),
        filters(carve.take<A>(int64_t{taps} << t.planes_log2)),
        bytes(carve.bytes()) {}
};

// A plane's number; planes past the last are computed as the last and not stored.
struct PlaneAt {
  int64_t n;
  int channel;
};
__device__ inline PlaneAt plane_at(const DepthwiseParams& t, const Tiling& tiling, int64_t plane) {
  const Division at = divide(min(plane, tiling.planes - 1), t.channels);
  return {at.quotient, at.remainder};
}

// Term j of every plane of the block: patches, zeros where nothing is, and filters, turned for
// dgrad.
template <class T>
__device__ inline void load_planes(const DepthwiseParams& t, const Tiling& tiling, int64_t first,
                                   int first_h, int first_w, int j,
                                   const Shared<accumulator_t<T>>& shared) {
  using A = accumulator_t<T>;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread & (tiling.columns() - 1);
  for (int i = thread >> tiling.columns_log2; i < tiling.patch_rows << tiling.planes_log2;
       i += tiling.threads() >> tiling.columns_log2) {
    const int plane = i / tiling.patch_rows, row = i - plane * tiling.patch_rows;
    const PlaneAt at = plane_at(t, tiling, first + plane);
    const int h = source_at(t.h, first_h * t.h.jump + t.h.start + row);
    const T* from = static_cast<const T*>(t.source) + at.n * t.src.n +
                    t.source_channel(at.channel, j) * t.src.c + max(h, 0) * t.src.h;
    A* to = shared.patches + i * tiling.patch_columns;
    for (int column = lane; column < tiling.patch_columns; column += tiling.columns()) {
      const int w = source_at(t.w, first_w * t.w.jump + t.w.start + column);
      to[column] = h >= 0 && w >= 0 ? widen(from[w]) : A(0);
    }
  }
  const int taps = t.h.taps * t.w.taps;
  for (int i = thread; i < taps << tiling.planes_log2; i += tiling.threads()) {
    const int plane = i / taps, tap = i - plane * taps;
    const PlaneAt at = plane_at(t, tiling, first + plane);
    const int64_t filter = t.filter_of(at.channel, j);
    const T* from = static_cast<const T*>(t.filter) + filter * taps;
    shared.filters[i] = widen(from[t.backward ? taps - 1 - tap : tap]);
  }
}

template <class A, int kRows>
__device__ inline void add_rows(const A* patch, const A* filter, int pitch, int taps_w,
                                A (&sum)[kDown]) {
  A x[kDown + kRows - 1], f[kRows];
#pragma unroll
  for (int i = 0; i < kDown + kRows - 1; ++i) x[i] = patch[i * pitch];
#pragma unroll
  for (int i = 0; i < kRows; ++i) f[i] = filter[i * taps_w];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int d = 0; d < kDown; ++d) sum[d] += f[i] * x[d + i];
  }
}

// kUnit: jump and dilation of the rows are 1.
template <class A, bool kUnit>
__device__ inline void add_taps(const DepthwiseParams& t, int pitch, const A* patch,
                                const A* filter, A (&sum)[kDown]) {
#pragma unroll 1
  for (int s = 0; s < t.w.taps; ++s) {
    const A* column = patch + s * t.w.dil;
    int r = 0;
    if constexpr (kUnit) {
#pragma unroll 1
      for (; r + kTogether <= t.h.taps; r += kTogether) {
        add_rows<A, kTogether>(column + r * pitch, filter + r * t.w.taps + s, pitch, t.w.taps, sum);
      }
#pragma unroll 1
      for (; r < t.h.taps; ++r) {
        add_rows<A, 1>(column + r * pitch, filter + r * t.w.taps + s, pitch, t.w.taps, sum);
      }
    } else {
#pragma unroll 1
      for (; r < t.h.taps; ++r) {
        const A f = filter[r * t.w.taps + s];
#pragma unroll
        for (int d = 0; d < kDown; ++d) {
          sum[d] += f * column[(d * t.h.jump + r * t.h.dil) * pitch];
        }
      }
    }
  }
}

template <class T, bool kUnit>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerSm)
    conv2d_depthwise_nchw_kernel(const DepthwiseParams t, const Tiling tiling) {
  using A = accumulator_t<T>;
  const Shared<A> shared(SharedCarver(shared_memory()), tiling, t.h.taps * t.w.taps);
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread & (tiling.columns() - 1);
  const int strip = (thread >> tiling.columns_log2) & ((1 << tiling.strips_log2) - 1);
  const int plane = thread >> (tiling.columns_log2 + tiling.strips_log2);
  const A* patch = shared.patches +
                   (plane * tiling.patch_rows + strip * kDown * t.h.jump) * tiling.patch_columns +
                   column * t.w.jump;
  const A* filter = shared.filters + plane * t.h.taps * t.w.taps;

  for (int64_t block = blockIdx.x; block < tiling.blocks; block += gridDim.x) {
    const Division by_w = divide(block, tiling.tiles_w);
    const Division by_h = divide(by_w.quotient, tiling.tiles_h);
    const int64_t first_plane = by_h.quotient << tiling.planes_log2;
    const int first_h = by_h.remainder * tiling.rows(), first_w = by_w.remainder * tiling.columns();
    A sum[kDown] = {};
    for (int j = 0; j < t.terms; ++j) {
      __syncthreads();  // the previous term's or block's readers are done
      load_planes<T>(t, tiling, first_plane, first_h, first_w, j, shared);
      __syncthreads();
      add_taps<A, kUnit>(t, tiling.patch_columns, patch, filter, sum);
    }
    const int row = first_h + strip * kDown, w = first_w + column;
    if (first_plane + plane >= tiling.planes || w >= t.w.target) continue;
    const PlaneAt at = plane_at(t, tiling, first_plane + plane);
    const int64_t offset = at.n * t.dst.n + at.channel * t.dst.c + row * t.dst.h + w;
#pragma unroll
    for (int d = 0; d < kDown; ++d) {
      if (row + d >= t.h.target) break;
      store_result<T>(t.epilogue, t.out, at.channel, offset + d * t.dst.h, sum[d]);
    }
  }
}

int log2_at_least(int64_t x, int most) {
  int log2 = 0;
  while (log2 < most && (int64_t{1} << log2) < x) ++log2;
  return log2;
}

// The largest tile whose patches and filters fit; with everything halved to the last, what is left.
Tiling tiling_of(const DepthwiseParams& t, DType dtype) {
  const int64_t size = size_of(accumulator_of(dtype));
  Tiling tiling = {};
  tiling.planes = t.N * t.channels;
  tiling.columns_log2 = log2_at_least(t.w.target, 5);
  tiling.strips_log2 = log2_at_least(ceil_div(t.h.target, kDown), 2);
  tiling.planes_log2 = 7 - tiling.columns_log2 - tiling.strips_log2;
  for (;;) {
    tiling.patch_rows = (tiling.rows() - 1) * t.h.jump + (t.h.taps - 1) * t.h.dil + 1;
    tiling.patch_columns = (tiling.columns() - 1) * t.w.jump + (t.w.taps - 1) * t.w.dil + 1;
    const int64_t plane = int64_t{tiling.patch_rows} * tiling.patch_columns + t.h.taps * t.w.taps;
    if (plane * size << tiling.planes_log2 <= kBudget) break;
    int* const halve = tiling.planes_log2 > 0    ? &tiling.planes_log2
                       : tiling.strips_log2 > 0  ? &tiling.strips_log2
                       : tiling.columns_log2 > 0 ? &tiling.columns_log2
                                                 : nullptr;
    if (halve == nullptr) break;
    --*halve;
  }
  tiling.tiles_h = to_int(ceil_div(t.h.target, tiling.rows()));
  tiling.tiles_w = to_int(ceil_div(t.w.target, tiling.columns()));
  tiling.blocks = ceil_div(tiling.planes, tiling.block_planes()) * tiling.tiles_h * tiling.tiles_w;
  return tiling;
}

int64_t shared_bytes(const DepthwiseParams& t, const Tiling& tiling, DType dtype) {
  const int taps = t.h.taps * t.w.taps;
  return dtype == DType::kFloat64 ? Shared<double>(SharedCarver(), tiling, taps).bytes
                                  : Shared<float>(SharedCarver(), tiling, taps).bytes;
}

}  // namespace

std::string depthwise_nchw_supports(const Conv2dProblem& p, bool backward, const Device& device) {
  // Extents first, of the widest tile and of the narrowest: sizes of arrays must fit an int too.
  const int64_t rows = (kDown - 1) * p.stride_h + (p.R - 1) * p.dil_h + 1;
  const int64_t columns = (p.S - 1) * p.dil_w + 1;
  const std::string why = refuse_beyond_int({{"patch width", 31 * p.stride_w + columns}});
  if (!why.empty()) return why;
  const int64_t most = device.shared_memory_per_block;
  const int64_t bytes = (rows * columns + p.R * p.S) * size_of(accumulator_of(p.dtype));
  if (rows > most || columns > most || bytes > most) {
    return "a patch of " + std::to_string(rows) + "x" + std::to_string(columns) +
           " positions in shared memory";
  }
  const DepthwiseParams t = depthwise_params_of(p, {}, backward);
  const int64_t needed = shared_bytes(t, tiling_of(t, p.dtype), p.dtype);
  if (needed > most) return std::to_string(needed) + " bytes of shared memory";
  return {};
}

void depthwise_nchw_launch(const char* name, const Conv2dProblem& p, const Conv2dArgs& args,
                           bool backward, void* stream) {
  const DepthwiseParams t = depthwise_params_of(p, args, backward);
  const Tiling tiling = tiling_of(t, p.dtype);
  const bool unit = t.h.jump == 1 && t.h.dil == 1;
  dispatch_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel =
        unit ? &conv2d_depthwise_nchw_kernel<T, true> : &conv2d_depthwise_nchw_kernel<T, false>;
    launch_kernel({name, std::min(tiling.blocks, kMaxBlocks), tiling.threads(), stream,
                   shared_bytes(t, tiling, p.dtype)},
                  kernel, t, tiling);
  });
}

}  // namespace cuda
}  // namespace fastconv
