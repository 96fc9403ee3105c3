// What the pooling kernels share: which part of a tensor a thread takes, which windows cover an
// input position, and the table's row.
//
// An NCHW tensor is N * C images of one channel in NHWC, so one kernel serves both layouts: a
// thread takes one position and, where C and the pointers allow it, as many channels as fill 16
// bytes.
#pragma once

#include <functional>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/element.h"
#include "cuda/launch.h"
#include "cuda/limits.h"

namespace fastconv {
namespace cuda {

constexpr int kPoolThreads = 256;

struct PoolGeometry {
  int64_t items;  // threads' worth of work: positions * packs of channels
  int packs;      // of channels in an image: C / pack size, or 1 in NCHW
  int channels;   // C, or 1 in NCHW
  int H, W, R, S, P, Q;
  int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
};

// supports() has made sure that all of it fits.
inline void set_geometry(PoolGeometry& t, const Pool2dProblem& p, int vector) {
  const auto to_int = [](int64_t value) { return static_cast<int>(value); };
  t.channels = p.layout == Layout::kNCHW ? 1 : to_int(p.C);
  t.packs = t.channels / vector;
  t.H = to_int(p.H);
  t.W = to_int(p.W);
  t.R = to_int(p.R);
  t.S = to_int(p.S);
  t.P = to_int(p.P);
  t.Q = to_int(p.Q);
  t.stride_h = to_int(p.stride_h);
  t.stride_w = to_int(p.stride_w);
  t.pad_h = to_int(p.pad_h);
  t.pad_w = to_int(p.pad_w);
  t.dil_h = to_int(p.dil_h);
  t.dil_w = to_int(p.dil_w);
}

// Bounds every position and every offset inside a window that the kernels compute in an int.
inline std::string refuse_pool_beyond_int(const Pool2dProblem& p) {
  return refuse_beyond_int({{"C", p.C},
                            {"output height", p.P},
                            {"output width", p.Q},
                            {"window", p.R * p.S},
                            {"padded height", p.H + 2 * p.pad_h + p.R * p.dil_h + p.stride_h},
                            {"padded width", p.W + 2 * p.pad_w + p.S * p.dil_w + p.stride_w}});
}

// Whether tensors of this layout and number of channels can be moved in packs of `size` channels.
inline bool packs_fit(const Pool2dProblem& p, int size, std::initializer_list<const void*> all) {
  bool fit = p.layout == Layout::kNHWC && p.C % size == 0;
  for (const void* tensor : all) fit = fit && is_aligned(tensor, kPackBytes);
  return fit;
}

// The channels at one position of an image with `rows` x `cols` positions.
struct PoolItem {
  int row, col;
  int64_t image;    // which
  int channel;      // the first of the pack
  int64_t element;  // where the pack lies
};

template <int kVector>
__device__ inline PoolItem item_at(const PoolGeometry& t, int64_t i, int rows, int cols) {
  const Division pack = divide(i, t.packs);
  const Division col = divide(pack.quotient, cols);
  const Division row = divide(col.quotient, rows);
  const int channel = pack.remainder * kVector;
  return {row.remainder, col.remainder, row.quotient, channel,
          pack.quotient * t.channels + channel};
}

// The windows along one axis that cover position `x`: those numbered begin to end - 1. With a
// dilation, of these only the ones whose first tap, `number * stride - pad`, lies a multiple of the
// dilation before it.
struct Cover {
  int begin, end;
};
__device__ inline Cover windows_over(int x, int pad, int stride, int extent, int count) {
  const int t = x + pad;
  return {t < extent ? 0 : (t - extent) / stride + 1, min(t / stride + 1, count)};
}

inline Pool2dKernel pool2d_row(
    const char* name, const char* op, Direction direction,
    std::function<void(const Pool2dProblem&, const Pool2dArgs&, const Context&)> launch) {
  Pool2dKernel row;
  row.name = name;
  row.op = op;
  row.direction = direction;
  row.backend = Backend::kCuda;
  row.arch = "sm_80";
  row.dtypes = kAllDTypes;
  row.layouts = kAllLayouts;
  row.supports = [](const Pool2dProblem& p, const Device&) { return refuse_pool_beyond_int(p); };
  row.cost = [](const Pool2dProblem& p, const Device& device) {
    return expected_us(p.bytes(), 0, 1, device);
  };
  row.launch = std::move(launch);
  return row;
}

}  // namespace cuda
}  // namespace fastconv
