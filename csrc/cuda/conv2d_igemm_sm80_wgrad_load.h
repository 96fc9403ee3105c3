// How the filter gradient's tiles come into shared memory: which results a block has, where its
// columns and pixels lie in the input, and the loaders of both operands.
#pragma once

#include "cuda/conv2d.h"
#include "cuda/conv2d_igemm_sm80_wgrad.h"
#include "cuda/ptx/cp_async.h"

namespace fastconv {
namespace cuda {
namespace sm80_wgrad {

// How a thread steps from output pixel to output pixel, as positions and offsets in the input: an
// offset needs a multiplication for each of n, h, w, a step one addition and two where a row or an
// image ends.
struct WalkStep {
  int h, w;
  int64_t offset, next_row, next_image;
};

struct WgradParams {
  ConvParams conv;              // `in` and `res` are the copies' strides where there are copies
  float* partials;              // [split][K][pitch], or null: a block has whole sums
  int64_t in_group, res_group;  // from a group to the next
  int64_t pixels_per_split;
  WalkStep step;
  int row_span, image_span;          // Q * stride_w, P * stride_h
  int k_tiles, column_tiles;         // a group
  int columns, tap_channels, pitch;  // columns a group = R * S * tap_channels; pitch: in fours
};

// One tile of the results and a share of the pixels.
struct TileAt {
  int group, first_k, first_column, split, pixels;
  int64_t begin;  // the first pixel

  __device__ TileAt(const WgradParams& t, int block, int rows, int cols) {
    first_column = block % t.column_tiles * cols;
    block /= t.column_tiles;
    first_k = block % t.k_tiles * rows;
    block /= t.k_tiles;
    group = block % t.conv.G;
    split = block / t.conv.G;
    begin = split * t.pixels_per_split;
    pixels = static_cast<int>(min(t.pixels_per_split, t.conv.pixels - begin));
  }
};

struct Tap {
  int r, s, c;
};
__device__ inline Tap tap_at(const WgradParams& t, int column) {
  const int tap = column / t.tap_channels, r = tap / t.conv.S;
  return {r, tap - r * t.conv.S, column - tap * t.tap_channels};
}

// A column's place in the input, relative to tap (0, 0) of a window that no padding shifts.
struct alignas(16) Reach {
  int h, w;
  int64_t offset;

  __device__ Reach(const WgradParams& t, int column) {
    constexpr int kNowhere = -(1 << 30);  // outside whatever the pixel: h + kNowhere < 0
    const ConvParams& conv = t.conv;
    const Tap tap = tap_at(t, column);
    h = tap.r * conv.dil_h - conv.pad_h;
    w = tap.s * conv.dil_w - conv.pad_w;
    offset = h * conv.in.h + w * conv.in.w + tap.c * conv.in.c;
    if (column >= t.columns) h = kNowhere;
  }
};

// The window of an output pixel as a thread walks over them, WalkStep by WalkStep.
struct Window {
  int h, w;
  int64_t offset;

  __device__ Window(const WgradParams& t, int64_t index) {
    const Pixel pixel = pixel_at(index, t.conv.P, t.conv.Q);
    h = pixel.row * t.conv.stride_h;
    w = pixel.col * t.conv.stride_w;
    offset = cuda::offset_of(t.conv.in, {pixel.n, h, w});
  }
  __device__ void advance(const WgradParams& t) {
    w += t.step.w;
    h += t.step.h;
    offset += t.step.offset;
    if (w >= t.row_span) {
      w -= t.row_span;
      h += t.conv.stride_h;
      offset += t.step.next_row;
    }
    if (h >= t.image_span) {
      h -= t.image_span;
      offset += t.step.next_image;
    }
  }
  __device__ bool holds(int tap_h, int tap_w, const ConvParams& conv) const {
    return within(h + tap_h, conv.H) && within(w + tap_w, conv.W);
  }
};

// Loaders: each brings one operand's share of a stage, and the next call the next stage's.
// By cp.async a thread has one unit of a row, and every kRows-th row from its first on.
template <class Tile>
class GradUnits {
 public:
  __device__ GradUnits(const WgradParams& t, const TileAt& at) : step_(kRows * t.conv.res.w) {
    const int unit = static_cast<int>(threadIdx.x) % Side::kUnits;
    const int row = static_cast<int>(threadIdx.x) / Side::kUnits;
    const int k = at.first_k + unit * Tile::kPack;
    to_ = Side::offset_of(row, unit);
    left_ = k < t.conv.k_per_group ? at.pixels - row : 0;
    from_ = static_cast<const T*>(t.conv.grad) + at.group * t.res_group +
            (at.begin + row) * t.conv.res.w + k;
  }
  __device__ void load(unsigned char* tile) {
#pragma unroll
    for (int row = 0; row < Tile::kDepth; row += kRows) {
      ptx::cp_async<16>(ptx::shared_address(tile + to_ + row * Side::kRowBytes), from_,
                        left_ > row ? kPackBytes : 0);
      from_ += step_;
    }
    left_ -= Tile::kDepth;
  }

 private:
  using T = typename Tile::T;
  using Side = typename Tile::Grad;
  static constexpr int kRows = Side::kRows;

  int to_, left_;  // left_: pixels from this thread's row on; none where the filters do not exist
  const T* from_;
  int64_t step_;
};

// Through L1: where a tile has several taps, they read the same pixels one after the other.
template <class Tile>
class ColumnUnits {
  using T = typename Tile::T;
  using Side = typename Tile::Columns;
  static constexpr int kRows = Side::kRows;

 public:
  static constexpr int kPixels = kRows;  // a WalkStep
  static constexpr int kReaches = 0;     // in shared memory
  static constexpr bool kGathers = false;

  __device__ ColumnUnits(const WgradParams& t, const TileAt& at, Reach*)
      : t_(t), window_(t, at.begin + static_cast<int>(threadIdx.x) / Side::kUnits) {
    const int unit = static_cast<int>(threadIdx.x) % Side::kUnits;
    const int row = static_cast<int>(threadIdx.x) / Side::kUnits;
    const Reach reach(t, at.first_column + unit * Tile::kPack);
    h_ = reach.h;
    w_ = reach.w;
    to_ = Side::offset_of(row, unit);
    left_ = at.pixels - row;
    input_ = static_cast<const T*>(t.conv.input) + at.group * t.in_group + reach.offset;
  }
  __device__ void load(unsigned char* tile) {
#pragma unroll
    for (int row = 0; row < Tile::kDepth; row += kRows) {
      const bool inside = left_ > row && window_.holds(h_, w_, t_.conv);
      ptx::cp_async_cached_16(ptx::shared_address(tile + to_ + row * Side::kRowBytes),
                              input_ + window_.offset, inside ? kPackBytes : 0);
      window_.advance(t_);
    }
    left_ -= Tile::kDepth;
  }
  __device__ void store(unsigned char*) {}

 private:
  const WgradParams& t_;
  Window window_;
  int h_, w_, to_, left_;
  const T* input_;
};

// Value by value: a thread has one pixel of a stage and kPacks units of it, which wait in registers
// between load() and store(), while the tensor cores work. The constructor fills `reaches` for the
// whole block; a barrier follows.
template <class Tile>
class ColumnPatches {
  using T = typename Tile::T;
  using Side = typename Tile::Columns;
  static constexpr int kPacks = Tile::kDepth * Side::kUnits / Tile::kThreads;
  static_assert(kPacks * Tile::kThreads == Tile::kDepth * Side::kUnits, "whole units a thread");

 public:
  static constexpr int kPixels = Tile::kDepth;
  static constexpr int kReaches = Tile::kN;
  static constexpr bool kGathers = true;

  __device__ ColumnPatches(const WgradParams& t, const TileAt& at, Reach* reaches)
      : t_(t),
        input_(static_cast<const T*>(t.conv.input) + at.group * t.in_group),
        reaches_(reaches),
        row_(static_cast<int>(threadIdx.x) % Tile::kDepth),
        first_(static_cast<int>(threadIdx.x) / Tile::kDepth * kPacks * Tile::kPack),
        left_(at.pixels - row_),
        window_(t, at.begin + row_) {
    for (int i = static_cast<int>(threadIdx.x); i < Tile::kN; i += Tile::kThreads) {
      reaches[i] = Reach(t, at.first_column + i);
    }
  }
  __device__ void load(unsigned char*) {
    const T* input = input_ + window_.offset;
#pragma unroll
    for (int e = 0; e < kPacks * Tile::kPack; ++e) {
      const Reach reach = reaches_[first_ + e];
      T value = narrow<T>(0);
      if (left_ > 0 && window_.holds(reach.h, reach.w, t_.conv)) value = input[reach.offset];
      packs_[e / Tile::kPack].at[e % Tile::kPack] = value;
    }
    window_.advance(t_);
    left_ -= Tile::kDepth;
  }
  __device__ void store(unsigned char* tile) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int to = Side::offset_of(row_, first_ / Tile::kPack + i);
      store_pack(reinterpret_cast<T*>(tile + to), packs_[i]);
    }
  }

 private:
  const WgradParams& t_;
  const T* input_;  // of the group
  const Reach* reaches_;
  int row_, first_, left_;
  Window window_;
  Pack<T, Tile::kPack> packs_[kPacks];
};

}  // namespace sm80_wgrad
}  // namespace cuda
}  // namespace fastconv
