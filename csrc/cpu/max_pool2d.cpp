// Max pooling on a CPU: the table's rows, and the plain reference.
//
// A window is read row by row, and an element becomes the maximum when it is greater than the
// maximum so far or is NaN: of equal elements the first is kept, of several NaNs the last, as torch
// does. A window of -inf alone, or of nothing, keeps the position of its first tap that is not
// above or left of the tensor.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/pool2d.h"
#include "cpu/streaming.h"
#include "cpu/table.h"

#define FASTCONV_KERNEL_FILE "cpu/max_pool2d.inl"
#include "cpu/for_each_isa.h"

namespace fastconv {
namespace {

int64_t read_index(const void* index, PoolIndex kind, int64_t i) {
  return kind == PoolIndex::kOffset8    ? static_cast<const uint8_t*>(index)[i]
         : kind == PoolIndex::kOffset32 ? static_cast<const int32_t*>(index)[i]
                                        : static_cast<const int64_t*>(index)[i];
}

void write_index(void* index, PoolIndex kind, int64_t i, int64_t value) {
  if (kind == PoolIndex::kOffset8) static_cast<uint8_t*>(index)[i] = static_cast<uint8_t>(value);
  if (kind == PoolIndex::kOffset32) static_cast<int32_t*>(index)[i] = static_cast<int32_t>(value);
  if (kind == PoolIndex::kFlatIndex64) static_cast<int64_t*>(index)[i] = value;
}

template <class T>
void reference_fprop_plane(const Pool2dProblem& t, const Pool2dArgs& a, int64_t n, int64_t c) {
  using A = accumulator_t<T>;
  const PlaneStrides in(t.layout, t.C, t.H, t.W), out(t.layout, t.C, t.P, t.Q);
  const T* x = static_cast<const T*>(a.input) + n * in.n + c * in.c;
  for (int64_t p = 0; p < t.P; ++p) {
    for (int64_t q = 0; q < t.Q; ++q) {
      const int64_t h0 = p * t.stride_h - t.pad_h, w0 = q * t.stride_w - t.pad_w;
      int64_t best_r = first_tap(h0, t.dil_h), best_s = first_tap(w0, t.dil_w);
      A best = -std::numeric_limits<A>::infinity();
      for (int64_t r = best_r; r < t.R && h0 + r * t.dil_h < t.H; ++r) {
        for (int64_t s = first_tap(w0, t.dil_w); s < t.S && w0 + s * t.dil_w < t.W; ++s) {
          const A value(x[(h0 + r * t.dil_h) * in.row + (w0 + s * t.dil_w) * in.col]);
          if (value > best || std::isnan(value)) {
            best = value;
            best_r = r;
            best_s = s;
          }
        }
      }
      const int64_t i = n * out.n + c * out.c + p * out.row + q * out.col;
      static_cast<T*>(a.out)[i] = T(best);
      if (t.index == PoolIndex::kFlatIndex64) {
        write_index(a.index_out, t.index, i, (h0 + best_r * t.dil_h) * t.W + w0 + best_s * t.dil_w);
      } else if (t.index != PoolIndex::kNone) {
        write_index(a.index_out, t.index, i, best_r * t.S + best_s);
      }
    }
  }
}

// The input's row and column that the kept position of output (p, q) stands for.
struct Position {
  int64_t h, w;
};
Position position_of(const Pool2dProblem& t, int64_t p, int64_t q, int64_t index) {
  if (t.index == PoolIndex::kFlatIndex64) return {index / t.W, index % t.W};
  return {p * t.stride_h - t.pad_h + index / t.S * t.dil_h,
          q * t.stride_w - t.pad_w + index % t.S * t.dil_w};
}

template <class T>
void reference_dgrad_plane(const Pool2dProblem& t, const Pool2dArgs& a, int64_t n, int64_t c) {
  using A = accumulator_t<T>;
  const PlaneStrides in(t.layout, t.C, t.H, t.W), out(t.layout, t.C, t.P, t.Q);
  std::vector<A> sum(static_cast<size_t>(t.H * t.W), A(0));
  for (int64_t p = 0; p < t.P; ++p) {
    for (int64_t q = 0; q < t.Q; ++q) {
      const int64_t i = n * out.n + c * out.c + p * out.row + q * out.col;
      const Position at = position_of(t, p, q, read_index(a.index_in, t.index, i));
      // The position of a window with nothing inside the tensor may lie outside.
      if (at.h < 0 || at.h >= t.H || at.w < 0 || at.w >= t.W) continue;
      sum[static_cast<size_t>(at.h * t.W + at.w)] += A(static_cast<const T*>(a.grad)[i]);
    }
  }
  T* dx = static_cast<T*>(a.out) + n * in.n + c * in.c;
  for (int64_t h = 0; h < t.H; ++h) {
    for (int64_t w = 0; w < t.W; ++w) {
      dx[h * in.row + w * in.col] = T(sum[static_cast<size_t>(h * t.W + w)]);
    }
  }
}

void launch_reference(const Pool2dProblem& t, const Pool2dArgs& a, const Context& context,
                      Direction direction) {
  dispatch_dtype(t.dtype, [&](auto type) {
    using T = decltype(type);
    context.parallel_for(t.N * t.C, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t n = plane / t.C, c = plane % t.C;
        if (direction == Direction::kFprop) {
          reference_fprop_plane<T>(t, a, n, c);
        } else {
          reference_dgrad_plane<T>(t, a, n, c);
        }
      }
    });
  });
}

// The reference writes and reads positions of any kind; the vector rows hold them in 32 bits.
std::string refuse_large(const Pool2dProblem& t, const Device&) {
  const int64_t limit = INT32_MAX;
  const int64_t height = t.H + 2 * t.pad_h, width = t.W + 2 * t.pad_w;
  if (height > limit || width > limit || height > limit / std::max<int64_t>(width, 1)) {
    return "a plane of " + std::to_string(t.H) + " x " + std::to_string(t.W) +
           " has positions beyond 32 bits";
  }
  if (t.R > height || t.S > width || t.stride_h > height || t.stride_w > width) {
    return "the window's size or stride exceeds the padded plane";
  }
  return {};
}

// Gradients are scattered by row and column; the reference skips windows with no element at all,
// which dilation or padding beyond the window can make.
bool axis_has_empty_window(int64_t size, int64_t outputs, int64_t taps, int64_t stride,
                           int64_t dilation, int64_t pad) {
  if (dilation == 1 && pad < taps && (outputs - 1) * stride < size + pad) return false;
  for (int64_t p = 0; p < outputs; ++p) {
    const int64_t start = p * stride - pad, tap = first_tap(start, dilation);
    if (tap >= taps || start + tap * dilation >= size) return true;
  }
  return false;
}

std::string refuse_scatter(const Pool2dProblem& t, const Device& device) {
  if (axis_has_empty_window(t.H, t.P, t.R, t.stride_h, t.dil_h, t.pad_h) ||
      axis_has_empty_window(t.W, t.Q, t.S, t.stride_w, t.dil_w, t.pad_w)) {
    return "a window has no element of the input";
  }
  return refuse_large(t, device);
}

}  // namespace

void add_cpu_max_pool2d_rows(KernelTable& table) {
  for (const Direction direction : {Direction::kFprop, Direction::kDgrad}) {
    const bool fprop = direction == Direction::kFprop;
    const auto add = [&](const char* arch, double bandwidth, auto launch) {
      table.pool2d.push_back(pool2d_row("max_pool2d", arch, direction, bandwidth, launch));
      table.pool2d.back().supports = fprop ? refuse_large : refuse_scatter;
    };
#if defined(__x86_64__)
    add("avx512", kAvx512Bandwidth, fprop ? avx512::max_pool2d_fprop : avx512::max_pool2d_dgrad);
    add("avx2", kAvx2Bandwidth, fprop ? avx2::max_pool2d_fprop : avx2::max_pool2d_dgrad);
#endif
    add("portable", kPortableBandwidth,
        fprop ? portable::max_pool2d_fprop : portable::max_pool2d_dgrad);
    table.pool2d.push_back(pool2d_row(
        "max_pool2d", "reference", direction, kReferenceBandwidth,
        [direction](const Pool2dProblem& t, const Pool2dArgs& a, const Context& context) {
          launch_reference(t, a, context, direction);
        }));
  }
}

}  // namespace fastconv
