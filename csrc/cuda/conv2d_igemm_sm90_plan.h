// How a convolution becomes phases, tensor maps and tiles of the Hopper implicit GEMM.
#pragma once

#include <algorithm>
#include <numeric>
#include <string>

#include "cuda/conv2d_igemm_sm90.h"
#include "cuda/conv2d_layout.h"

namespace fastconv {
namespace cuda {
namespace igemm_sm90 {

constexpr int kRowBytes = 128;  // of channels, a step of the main loop

// A problem as the main loop sees it.
struct View {
  bool dgrad, tiled;
  int64_t red, outs;      // channels of a group, summed over and written
  int64_t height, width;  // of the activations
  int64_t padded;         // channels of a group in the activations as they are read
  bool copy_input, copy_filter;
};

inline bool splits(const Conv2dProblem& p) { return p.dtype == DType::kFloat32 && !p.tf32; }
inline int depth_of(DType dtype) { return kRowBytes / static_cast<int>(size_of(dtype)); }

inline View view_of(const Conv2dProblem& p, Direction direction, bool one_tap) {
  View v = {};
  v.dgrad = direction == Direction::kDgrad;
  v.tiled = one_tap;
  v.red = (v.dgrad ? p.K : p.C) / p.G;
  v.outs = (v.dgrad ? p.C : p.K) / p.G;
  v.height = v.dgrad ? p.P() : p.H;
  v.width = v.dgrad ? p.Q() : p.W;
  v.padded = padded_channels(v.red, p.dtype);
  // One pixel an image, or one tap a channel: both layouts are the same bytes.
  const bool by_pixel = p.layout == Layout::kNHWC || v.height * v.width == 1;
  const bool by_tap = p.filter_layout == Layout::kNHWC || p.is_1x1();
  v.copy_input = !by_pixel || v.padded != v.red;
  v.copy_filter = v.dgrad || !by_tap || v.padded != v.red || splits(p);
  return v;
}

inline int64_t result_pixels(const Conv2dProblem& p, const View& v) {
  return p.N * (v.dgrad ? p.H * p.W : p.P() * p.Q());
}

inline FilterCopy filter_copy_of(const Conv2dProblem& p, const View& v) {
  return {v.dgrad ? FilterOrder::kCRSK : FilterOrder::kKRSC, splits(p)};
}

// ---- phases ----

// Results phase, phase + phases, ... of one axis: result i of them has its window at start + i *
// jump, and meets tap first_tap + j * tap_step at a distance of offset + j * move from there.
struct AxisPhase {
  int count, start, taps, first_tap, offset;
  int lower, upper;  // of the positions that windows begin at, as Im2colMap has them
};
struct Axis {
  int size, out, taps, stride, pad, dil;
  bool dgrad;

  int phases() const { return dgrad ? std::max(1, std::min(stride, size)) : 1; }
  int jump() const { return dgrad ? 1 : stride; }
  int tap_step() const { return dgrad ? stride / std::gcd(stride, dil) : 1; }
  int move() const { return dgrad ? -dil / std::gcd(stride, dil) : dil; }
  AxisPhase phase(int number) const;
};

// dgrad: tap r of result h reads activation (h + pad - r * dil) / stride where that is whole, so
// later taps read earlier activations: the window begins at the last, and offsets descend.
inline AxisPhase Axis::phase(int number) const {
  if (!dgrad) return {out, -pad, taps, 0, 0, -pad, pad - (taps - 1) * dil};
  AxisPhase a = {};
  a.count = (size - 1 - number) / phases() + 1;
  for (int r = 0; r < std::min(tap_step(), taps); ++r) {
    const int from = number + pad - r * dil;
    if (from % stride != 0) continue;
    a.first_tap = r;
    a.taps = (taps - 1 - r) / tap_step() + 1;
    a.offset = (a.taps - 1) * -move();
    a.start = from / stride - a.offset;
    break;
  }
  a.lower = a.start;
  a.upper = a.start + a.count - out;
  return a;
}

struct Axes {
  Axis h, w;
  int phases() const { return h.phases() * w.phases(); }
};
inline Axes axes_of(const Conv2dProblem& p, const View& v) {
  return {{to_int(p.H), to_int(p.P()), to_int(p.R), to_int(p.stride_h), to_int(p.pad_h),
           to_int(p.dil_h), v.dgrad},
          {to_int(p.W), to_int(p.Q()), to_int(p.S), to_int(p.stride_w), to_int(p.pad_w),
           to_int(p.dil_w), v.dgrad}};
}

// ---- tensor maps ----

inline CUtensorMapDataType map_type(const Conv2dProblem& p) {
  switch (p.dtype) {
    case DType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    default:  // TFLOAT32 rounds as it loads; 3xTF32 splits for itself
      return splits(p) ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  }
}

inline TiledMap pixels_map(const Conv2dProblem& p, const View& v, const void* base, int rows) {
  const int64_t C = v.padded * p.G;
  TiledMap map = {map_type(p), base, 2, {C, p.N * v.height * v.width}, {1, C}};
  map.box[0] = depth_of(p.dtype);
  map.box[1] = rows;
  map.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  return map;
}

inline Im2colMap window_map(const Conv2dProblem& p, const View& v, const Axes& axes,
                            const AxisPhase& h, const AxisPhase& w, const void* base, int rows) {
  const int64_t C = v.padded * p.G;
  return {map_type(p),
          base,
          {C, v.width, v.height, p.N},
          {1, C, v.width * C, v.height * v.width * C},
          {w.lower, h.lower},
          {w.upper, h.upper},
          {axes.w.jump(), axes.h.jump()},
          depth_of(p.dtype),
          rows,
          CU_TENSOR_MAP_SWIZZLE_128B};
}

// [rows][taps][channels summed over]; of a split filter the low parts' rows follow the high ones'.
inline TiledMap filter_map(const Conv2dProblem& p, const View& v, const void* base, int rows) {
  const int64_t taps = p.R * p.S;
  TiledMap map = {map_type(p),
                  base,
                  3,
                  {v.padded, taps, v.outs * p.G * (splits(p) ? 2 : 1)},
                  {1, v.padded, taps * v.padded}};
  map.box[0] = depth_of(p.dtype);
  map.box[1] = 1;
  map.box[2] = rows;
  map.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  return map;
}

// Whether results can leave as boxes: one line of pixels, one of filters, and little to do on the
// way. Wide activations and a residual take the general way.
inline bool stores_boxes(const Conv2dProblem& p, const View& v, const Axes& axes) {
  const int64_t pixels = result_pixels(p, v);
  const Epilogue& e = p.epilogue;
  const bool simple =
      v.dgrad || (!e.residual && !e.statistics &&
                  (e.activation == Activation::kNone || e.activation == Activation::kReLU));
  return simple && size_of(p.dtype) == 2 && p.G == 1 && v.outs % 8 == 0 && pixels <= 0x7fffffff &&
         axes.phases() == 1 && (p.layout == Layout::kNHWC || pixels == p.N);
}

inline TiledMap results_map(const Conv2dProblem& p, const View& v, void* base) {
  const int64_t pixels = result_pixels(p, v);
  TiledMap map = {map_type(p), base, 2, {v.outs, pixels}, {1, v.outs}};
  map.box[0] = map.box[1] = 64;
  map.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  return map;
}

// ---- tiles ----

// What decides about bits follows from the problem alone, as if every GPU had an H200's SMs.
constexpr int64_t kNominalSms = 132;

// How many blocks share a sum. Eight steps of a tile's take about as long as filling the ring.
inline int splits_of(const Conv2dProblem& p, const View& v, const Axes& axes) {
  if (axes.phases() != 1 || p.epilogue.statistics) return 1;
  constexpr int64_t kLeastSteps = 8, kMost = 16;
  const AxisPhase h = axes.h.phase(0), w = axes.w.phase(0);
  const int64_t steps = ceil_div(v.red, depth_of(p.dtype)) * h.taps * w.taps;
  const int64_t tiles = ceil_div(p.N * h.count * w.count, 128) * ceil_div(v.outs, 128) * p.G;
  return to_int(std::max<int64_t>(
      1, std::min({kNominalSms / std::max<int64_t>(tiles, 1), steps / kLeastSteps, kMost})));
}

struct Cut {
  int64_t first_tile[kMostPhases], pixel_tiles, group_tiles, tiles;
  int splits;    // each with as many tiles
  double steps;  // of the main loop, in all tiles of all splits
};

inline Cut cut_of(const Conv2dProblem& p, const View& v, const Axes& axes,
                  const IgemmTileShape& shape) {
  Cut cut = {};
  cut.group_tiles = ceil_div(v.outs, shape.columns);
  const int64_t filter_tiles = cut.group_tiles * p.G, chunks = ceil_div(v.red, depth_of(p.dtype));
  for (int i = 0; i < axes.phases(); ++i) {
    const AxisPhase h = axes.h.phase(i / axes.w.phases()), w = axes.w.phase(i % axes.w.phases());
    const int64_t tiles = ceil_div(p.N * h.count * w.count, shape.rows * shape.cluster);
    cut.first_tile[i] = cut.pixel_tiles;
    cut.pixel_tiles += tiles;
    cut.steps += static_cast<double>(tiles * filter_tiles * h.taps * w.taps * chunks);
  }
  cut.tiles = cut.pixel_tiles * filter_tiles;
  cut.splits = splits_of(p, v, axes);
  return cut;
}

// ---- cost ----

// What a tile costs besides its products, and how near to the tensor cores' peak those come. A step
// of 128 x 128 is 512 cycles of products and reads 24 KB from L2 in a cluster of two, 48 bytes a
// cycle; L2 gives about 30. 128 x 256 reads 32 a cycle, 128 x 64 without a cluster 96. Of TF32 a
// step is as many bytes and products take twice as long.
struct TileCost {
  double share_16bit, share_tf32;
  double exposed;  // cycles a tile in which nothing multiplies: filling the ring, storing
};
constexpr TileCost kTileCosts[] = {
    {0.32, 0.55, 400}, {0.6, 0.7, 600}, {0.75, 0.75, 1500}, {0.55, 0.55, 1500}, {0.65, 0.65, 1500}};

// Cycles of an SM's tensor cores, idle SMs of the last wave included.
inline double busy_cycles(const Conv2dProblem& p, const View& v, const Axes& axes,
                          IgemmTileKind kind, int sms) {
  const IgemmTileShape& shape = shape_of(kind);
  const TileCost& cost = kTileCosts[static_cast<int>(kind)];
  const Cut cut = cut_of(p, v, axes, shape);
  if (cut.tiles == 0) return 0;
  const double share = p.dtype == DType::kFloat32 ? cost.share_tf32 : cost.share_16bit;
  const double step = shape.rows * shape.columns * 64 / 2048.0 * (splits(p) ? 3 : 1);
  const int64_t tiles = cut.tiles * cut.splits;
  const double tile = cut.steps / static_cast<double>(tiles) * step / share + cost.exposed;
  return static_cast<double>(ceil_div(tiles, std::max(1, sms / shape.cluster))) * tile;
}

// A result is the same sum in every tile; the mean and M2 that a tile leaves are not.
inline IgemmTileKind tile_of(const Conv2dProblem& p, const View& v, const Axes& axes, int sms) {
  if (p.epilogue.statistics) sms = kNominalSms;
  using Kind = IgemmTileKind;
  constexpr Kind kRounded[] = {Kind::kPing128x64, Kind::kPing128x128, Kind::kWide128x256};
  constexpr Kind kSplit[] = {Kind::kSplit128x64, Kind::kSplit128x128};
  const Kind* const kinds = splits(p) ? kSplit : kRounded;
  Kind best = kinds[0];
  for (int i = 1; i < (splits(p) ? 2 : 3); ++i) {
    if (busy_cycles(p, v, axes, kinds[i], sms) < busy_cycles(p, v, axes, best, sms)) {
      best = kinds[i];
    }
  }
  return best;
}

}  // namespace igemm_sm90
}  // namespace cuda
}  // namespace fastconv
