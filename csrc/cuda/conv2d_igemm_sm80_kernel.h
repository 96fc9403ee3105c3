// fprop and dgrad on sm_80's tensor cores: pixels by channels written, summed over taps and
// channels read (conv2d_gather.h says which). For the files that compile it for one element type
// each.
//
// What is summed over lies in units of 16 bytes. By copies: a unit is neighbouring channels of one
// tap, and a step is four units of one tap, or where a tap has fewer, of several taps; taps are
// walked inside a chunk of channels, so that the neighbours of a pixel find its line in L1. By
// patches: where a tap has so few channels that padding them to units wastes most of the work, a
// unit is neighbours in the row (r, s, c) of taps and channels, gathered one by one.
#pragma once

#include "cuda/conv2d_gather.h"
#include "cuda/conv2d_igemm_sm80.h"

namespace fastconv {
namespace cuda {

struct IgemmParams {
  const void *source, *filter;
  StageTarget target;
  float* split_sums;  // null: no split; else [splits][tiles][kM * kN], as threads hold them
  Strides4 dst;
  int64_t src_n;
  // One image and the filter have fewer than 2^31 elements: this row's restriction, for the main
  // loop's sake. Filter strides: channels summed over and written, taps, a phase's next tap.
  int src_c, src_h, src_w;
  int flt_red, flt_out, flt_h, flt_w, flt_step_h, flt_step_w;
  int64_t N;
  int pixel_tiles, tiles;  // a block a tile: tiles * splits fit an int
  GatherAxis h, w;
  int G, red, outs;    // channels summed over, those of padding included, and written; a group
  int out_tiles;       // a group
  int tap_units_log2;  // units of one tap in a step
  int splits;
  bool backward;
};

struct IgemmLaunch {
  const char* name;
  int m, n;  // the tile's pixels and channels
  bool patches;
  void* stream;
};

// One tile of the results. Neighbouring blocks read the same pixels.
template <class Tile>
struct IgemmTileAt {
  AxisPhase h, w;
  int phase_h, phase_w, group, first_out, pixel_tile;
  int64_t first_pixel, pixels;  // of the phase

  __device__ IgemmTileAt(const IgemmParams& t, int tile) {
    const int by_out = tile / t.out_tiles, by_group = by_out / t.G;
    const int phase = by_group / t.pixel_tiles;
    first_out = (tile - by_out * t.out_tiles) * Tile::kN;
    group = by_out - by_group * t.G;
    pixel_tile = by_group - phase * t.pixel_tiles;
    phase_h = phase / t.w.phases;
    phase_w = phase - phase_h * t.w.phases;
    h = axis_phase(t.h, phase_h, t.backward);
    w = axis_phase(t.w, phase_w, t.backward);
    first_pixel = int64_t{pixel_tile} * Tile::kM;
    pixels = t.N * h.positions * w.positions;
  }
  __device__ int taps() const { return h.taps * w.taps; }
};

// The steps of the depth that one block of a tile's splits sums.
struct IgemmSteps {
  int first, count;
};
__device__ inline IgemmSteps igemm_steps(const IgemmParams& t, int all, int split) {
  const int each = (all + t.splits - 1) / t.splits;
  const int first = min(split * each, all);
  return {first, min(each, all - first)};
}

// Where in the source the windows of a thread's rows begin, `rows` pixels apart. A row beyond the
// last begins behind the edge that its taps lead away from.
template <class T, int kLoads>
struct IgemmRowsAt {
  const T* from[kLoads];  // the group's first channel; may lie outside the tensor
  int y[kLoads], x[kLoads];

  template <class Tile>
  __device__ IgemmRowsAt(const IgemmParams& t, const IgemmTileAt<Tile>& tile, int first) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t index = tile.first_pixel + first + i * kIgemmRows;
      const bool exists = index < tile.pixels;
      const Pixel j = pixel_at(exists ? index : 0, tile.h.positions, tile.w.positions);
      y[i] = exists ? j.row * t.h.jump + tile.h.start : t.backward ? -1 : t.h.source;
      x[i] = j.col * t.w.jump + tile.w.start;
      from[i] = static_cast<const T*>(t.source) + j.n * t.src_n + int64_t{y[i]} * t.src_h +
                int64_t{x[i]} * t.src_w + int64_t{tile.group} * (t.red * t.src_c);
    }
  }
  __device__ bool inside(const IgemmParams& t, int i, int dy, int dx) const {
    return within(y[i] + dy, t.h.source) && within(x[i] + dx, t.w.source);
  }
};

// What a thread loads of both operands: one unit of every kIgemmRows-th row, step by step.
template <class T, class Tile>
struct IgemmLoads {
  static constexpr int kUnit = kPackSize<T>;
  static constexpr int kStep = kIgemmUnits * kUnit;
  const IgemmParams& t;
  const AxisPhase &rows, &cols;
  const int unit, row;
  const IgemmRowsAt<T, Tile::kLoadsA> at;
  const T* filter;    // the thread's first row
  const int filters;  // that exist from there on

  __device__ IgemmLoads(const IgemmParams& t, const IgemmTileAt<Tile>& tile, int group_offset)
      : t(t),
        rows(tile.h),
        cols(tile.w),
        unit(static_cast<int>(threadIdx.x) % kIgemmUnits),
        row(static_cast<int>(threadIdx.x) / kIgemmUnits),
        at(t, tile, row),
        filter(static_cast<const T*>(t.filter) + tile.group * group_offset +
               int64_t{tile.first_out + row} * t.flt_out + tile.h.first_tap * t.flt_h +
               tile.w.first_tap * t.flt_w),
        filters(t.outs - tile.first_out - row) {}

  // From the image's first channel to a tap's, from a filter's likewise.
  __device__ int source_tap(int dy, int dx) const { return dy * t.src_h + dx * t.src_w; }
  __device__ int filter_tap(int h, int w) const { return h * t.flt_step_h + w * t.flt_step_w; }
};
static_assert(kIgemmRows % 8 == 0, "rows a thread loads differ by whole turns of the swizzle");

// By copies. What does not exist is a copy of no bytes, whose address is not looked at.
template <class T, class Tile>
struct IgemmCopies : IgemmLoads<T, Tile> {
  using Base = IgemmLoads<T, Tile>;
  using Base::kUnit, Base::t, Base::rows, Base::cols, Base::unit, Base::row, Base::at;
  int h = 0, w = 0, channel;

  static __device__ int steps(const IgemmParams& t, const IgemmTileAt<Tile>& tile) {
    const int log2 = t.tap_units_log2, chunk = kUnit << log2, taps_a_step = kIgemmUnits >> log2;
    return (tile.taps() + taps_a_step - 1) / taps_a_step * ((t.red + chunk - 1) / chunk);
  }

  __device__ IgemmCopies(const IgemmParams& t, const IgemmTileAt<Tile>& tile, int first_step)
      : Base(t, tile, t.outs * t.flt_out) {
    // Only a tap that fills the step has more chunks than one.
    const int taps = tile.taps();
    channel = (unit & ((1 << t.tap_units_log2) - 1)) * kUnit;
    if (taps == 0) return;
    const int tap = first_step * taps_a_step() + (unit >> t.tap_units_log2);
    channel += tap / taps * chunk();
    h = tap % taps / cols.taps;
    w = tap % taps % cols.taps;
  }

  __device__ void operator()(uint32_t stage) {
    const uint32_t to = stage + igemm_offset(row, unit);
    const int dy = h * t.h.move, dx = w * t.w.move;
    const bool exists = channel < t.red;
    const int source_at = this->source_tap(dy, dx) + channel;
#pragma unroll
    for (int i = 0; i < Tile::kLoadsA; ++i) {
      const bool inside = exists && at.inside(t, i, dy, dx);
      ptx::cp_async_cached_16(to + i * kIgemmRows * kIgemmRowBytes, at.from[i] + source_at,
                              inside ? 16 : 0);
    }
    const T* filter = this->filter + (this->filter_tap(h, w) + channel);
#pragma unroll
    for (int i = 0; i < Tile::kLoadsB; ++i) {
      ptx::cp_async<16>(to + (Tile::kM + i * kIgemmRows) * kIgemmRowBytes,
                        filter + int64_t{i * kIgemmRows} * t.flt_out,
                        exists && i * kIgemmRows < this->filters ? 16 : 0);
    }
    advance();
  }

 private:
  // From the kernel's parameters: in registers they would cost spills.
  __device__ int taps_a_step() const { return kIgemmUnits >> t.tap_units_log2; }
  __device__ int chunk() const { return kUnit << t.tap_units_log2; }
  __device__ void advance() {
    w += taps_a_step();
    if (taps_a_step() == 1) {
      if (w == cols.taps) {
        w = 0;
        ++h;
      }
    } else {
      while (w >= cols.taps) {
        w -= cols.taps;
        ++h;
      }
    }
    // Where a step holds several taps, starting over leads beyond the last channel.
    if (h >= rows.taps) {
      h = 0;
      channel += chunk();
    }
  }
};

// By patches, through registers.
template <class T, class Tile>
struct IgemmPatches : IgemmLoads<T, Tile> {
  using Base = IgemmLoads<T, Tile>;
  using Base::kUnit, Base::kStep, Base::t, Base::cols, Base::unit, Base::row, Base::at;
  const int depth;
  int next;  // of the depth, the unit's first

  static __device__ int steps(const IgemmParams& t, const IgemmTileAt<Tile>& tile) {
    return (tile.taps() * t.red + kStep - 1) / kStep;
  }

  __device__ IgemmPatches(const IgemmParams& t, const IgemmTileAt<Tile>& tile, int first_step)
      : Base(t, tile, t.backward ? t.red * t.flt_red : t.outs * t.flt_out),
        depth(tile.taps() * t.red),
        next(first_step * kStep + unit * kUnit) {}

  __device__ void operator()(unsigned char* stage) {
    Pack<T, kUnit> left[Tile::kLoadsA], right[Tile::kLoadsB];
    const int tap = next / t.red;
    int h = tap / cols.taps, w = tap - h * cols.taps, channel = next - tap * t.red;
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const bool exists = next + e < depth;
      const int dy = h * t.h.move, dx = w * t.w.move;
      const int source_at = this->source_tap(dy, dx) + channel * t.src_c;
#pragma unroll
      for (int i = 0; i < Tile::kLoadsA; ++i) {
        left[i].at[e] = T(0.f);
        if (exists && at.inside(t, i, dy, dx)) left[i].at[e] = at.from[i][source_at];
      }
      const T* filter = this->filter + (this->filter_tap(h, w) + channel * t.flt_red);
#pragma unroll
      for (int i = 0; i < Tile::kLoadsB; ++i) {
        right[i].at[e] = T(0.f);
        if (exists && i * kIgemmRows < this->filters) {
          right[i].at[e] = filter[int64_t{i * kIgemmRows} * t.flt_out];
        }
      }
      if (++channel == t.red) {
        channel = 0;
        if (++w == cols.taps) {
          w = 0;
          ++h;
        }
      }
    }
    next += kStep;
    T* to = reinterpret_cast<T*>(stage + igemm_offset(row, unit));
#pragma unroll
    for (int i = 0; i < Tile::kLoadsA; ++i) store_pack(to + i * kIgemmRows * kStep, left[i]);
#pragma unroll
    for (int i = 0; i < Tile::kLoadsB; ++i) {
      store_pack(to + (Tile::kM + i * kIgemmRows) * kStep, right[i]);
    }
  }
};

// What the epilogue needs to know of the tile. In shared memory, so that no register holds it, or
// what it follows from, while the product is computed.
struct IgemmPlace {
  int first_k, filters, pixel_tile;
};

template <class Tile>
struct IgemmShared {
  unsigned char* memory;  // stages, then sums
  int64_t* offsets;       // of the tile's pixels in the output; -1: none
  IgemmPlace* place;

  FASTCONV_HOST_DEVICE explicit IgemmShared(SharedCarver& carver)
      : memory(carver.take<unsigned char>(Tile::kSharedBytes, 1024)),
        offsets(carver.take<int64_t>(Tile::kM)),
        place(carver.take<IgemmPlace>(1)) {}
  __device__ float* sums() const { return reinterpret_cast<float*>(memory); }
};

template <class Tile>
int64_t igemm_shared_bytes() {
  SharedCarver carver;
  IgemmShared<Tile>{carver};
  return carver.bytes();
}

template <class Tile>
__device__ inline void igemm_put_place(const IgemmParams& t, const IgemmTileAt<Tile>& tile,
                                       const IgemmShared<Tile>& shared) {
  if (threadIdx.x == 0) {
    *shared.place = {tile.group * t.outs + tile.first_out, min(Tile::kN, t.outs - tile.first_out),
                     tile.pixel_tile};
  }
  if (threadIdx.x >= Tile::kM) return;
  const int64_t index = tile.first_pixel + threadIdx.x;
  const Pixel j = pixel_at(min(index, tile.pixels - 1), tile.h.positions, tile.w.positions);
  const Pixel to = {j.n, tile.phase_h + j.row * t.h.phases, tile.phase_w + j.col * t.w.phases};
  shared.offsets[threadIdx.x] = index < tile.pixels ? offset_of(t.dst, to) : -1;
}
static_assert(kIgemmThreads >= 128, "a thread for every row of the largest tile");

// Epilogue and store of a tile whose sums all threads have put into shared memory.
template <class T, class Tile>
__device__ inline void igemm_finish(const IgemmParams& t, const IgemmShared<Tile>& shared) {
  __syncthreads();
  const IgemmPlace place = *shared.place;
  store_tile<T, Tile::kM, Tile::kN, kIgemmThreads>(
      {shared.sums(), shared.offsets, place.first_k, place.filters}, t.target, place.pixel_tile,
      static_cast<int>(threadIdx.x), [] { __syncthreads(); });
}

// Where a thread's sums of one split lie, four at a time, neighbouring threads side by side.
template <class Tile>
struct IgemmSplitSums {
  float4* at;

  __device__ IgemmSplitSums(const IgemmParams& t, int tile, int split)
      : at(reinterpret_cast<float4*>(t.split_sums +
                                     (int64_t{split} * t.tiles + tile) * (Tile::kM * Tile::kN)) +
           threadIdx.x) {}
  __device__ float4& four(int i, int j) const { return at[(i * Tile::kJ + j) * kIgemmThreads]; }

  __device__ void store(const typename Tile::Sums& sum) const {
#pragma unroll
    for (int i = 0; i < Tile::kI; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kJ; ++j) {
        four(i, j) = make_float4(sum[i][j][0], sum[i][j][1], sum[i][j][2], sum[i][j][3]);
      }
    }
  }
};

// Patches, and both parts of the operands, need the registers of one block less.
template <class Math, class Tile, bool kPatches>
constexpr int kIgemmBlocks =
    kPatches || std::is_same_v<Math, Tf32x3> ? Tile::kBlocks - 1 : Tile::kBlocks;

template <class Math, class Tile, bool kPatches>
__global__ void __launch_bounds__(kIgemmThreads, kIgemmBlocks<Math, Tile, kPatches>)
    conv2d_igemm_sm80_kernel(const IgemmParams t) {
  using T = IgemmElement<Math>;
  SharedCarver carver(shared_memory());
  const IgemmShared<Tile> shared(carver);
  const int split = static_cast<int>(blockIdx.x) / t.tiles;
  const int index = static_cast<int>(blockIdx.x) % t.tiles;
  const IgemmTileAt<Tile> tile(t, index);
  if (tile.first_pixel >= tile.pixels) return;  // phases differ in size by a row or a column
  igemm_put_place(t, tile, shared);
  typename Tile::Sums sum = {};
  if constexpr (kPatches) {
    const IgemmSteps steps = igemm_steps(t, IgemmPatches<T, Tile>::steps(t, tile), split);
    igemm_by_registers<Math, Tile>(shared.memory, steps.count, sum,
                                   IgemmPatches<T, Tile>(t, tile, steps.first));
  } else {
    const IgemmSteps steps = igemm_steps(t, IgemmCopies<T, Tile>::steps(t, tile), split);
    igemm_async<Math, Tile>(shared.memory, steps.count, sum,
                            IgemmCopies<T, Tile>(t, tile, steps.first));
  }
  if (t.split_sums == nullptr) {
    igemm_put_sums<Tile>(shared.sums(), sum);
    igemm_finish<T>(t, shared);
  } else {
    IgemmSplitSums<Tile>(t, index, split).store(sum);
  }
}

// The second half of a split: the parts in ascending order, then what no split does at once.
template <class T, class Tile>
__global__ void __launch_bounds__(kIgemmThreads)
    conv2d_igemm_sm80_join_kernel(const IgemmParams t) {
  SharedCarver carver(shared_memory());
  const IgemmShared<Tile> shared(carver);
  const int index = static_cast<int>(blockIdx.x);
  const IgemmTileAt<Tile> tile(t, index);
  if (tile.first_pixel >= tile.pixels) return;
  igemm_put_place(t, tile, shared);
#pragma unroll 1
  for (int i = 0; i < Tile::kI; ++i) {
    float sum[Tile::kJ][4] = {};
#pragma unroll 2
    for (int split = 0; split < t.splits; ++split) {
      const IgemmSplitSums<Tile> from(t, index, split);
#pragma unroll
      for (int j = 0; j < Tile::kJ; ++j) {
        const float4 four = from.four(i, j);
        sum[j][0] += four.x;
        sum[j][1] += four.y;
        sum[j][2] += four.z;
        sum[j][3] += four.w;
      }
    }
    igemm_put_row<Tile>(shared.sums(), i, sum);
  }
  igemm_finish<T>(t, shared);
}

template <class Math, class Tile>
void launch_igemm_tile(const IgemmLaunch& launch, const IgemmParams& t) {
  const int64_t bytes = igemm_shared_bytes<Tile>();
  auto kernel = &conv2d_igemm_sm80_kernel<Math, Tile, false>;
  if constexpr (Tile::kPatches) {
    if (launch.patches) kernel = &conv2d_igemm_sm80_kernel<Math, Tile, true>;
  }
  launch_kernel({launch.name, int64_t{t.tiles} * t.splits, kIgemmThreads, launch.stream, bytes},
                kernel, t);
  if (t.split_sums == nullptr) return;
  launch_kernel({launch.name, t.tiles, kIgemmThreads, launch.stream, bytes},
                &conv2d_igemm_sm80_join_kernel<IgemmElement<Math>, Tile>, t);
}

template <class Math>
void launch_igemm(const IgemmLaunch& launch, const IgemmParams& t) {
  if (launch.n == IgemmLarge::kN) {
    if constexpr (!std::is_same_v<Math, Tf32x3>) launch_igemm_tile<Math, IgemmLarge>(launch, t);
  } else if (launch.m == IgemmTall::kM) {
    launch_igemm_tile<Math, IgemmTall>(launch, t);
  } else {
    launch_igemm_tile<Math, IgemmSmall>(launch, t);
  }
}
// Each compiled by a file of its own.
extern template void launch_igemm<__half>(const IgemmLaunch&, const IgemmParams&);
extern template void launch_igemm<__nv_bfloat16>(const IgemmLaunch&, const IgemmParams&);
extern template void launch_igemm<ptx::Tf32>(const IgemmLaunch&, const IgemmParams&);
extern template void launch_igemm<Tf32x3>(const IgemmLaunch&, const IgemmParams&);

}  // namespace cuda
}  // namespace fastconv
