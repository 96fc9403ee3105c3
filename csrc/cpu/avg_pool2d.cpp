// Average and adaptive average pooling on a CPU: the table's rows, and the plain reference.
#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/pool2d.h"
#include "cpu/streaming.h"
#include "cpu/table.h"

#define FASTCONV_KERNEL_FILE "cpu/avg_pool2d.inl"
#include "cpu/for_each_isa.h"

namespace fastconv {
namespace {

// Sums in float64, so that a global average over any plane is a reference; divides and rounds in
// the accumulator's type, as the fast rows do.
template <class T>
void reference_fprop_plane(const Pool2dProblem& t, const Pool2dArgs& a, int64_t n, int64_t c) {
  using A = accumulator_t<T>;
  const PlaneStrides in(t.layout, t.C, t.H, t.W), out(t.layout, t.C, t.P, t.Q);
  const T* x = static_cast<const T*>(a.input) + n * in.n + c * in.c;
  T* y = static_cast<T*>(a.out) + n * out.n + c * out.c;
  for (int64_t p = 0; p < t.P; ++p) {
    const AverageSpan rows = row_span(t, p);
    for (int64_t q = 0; q < t.Q; ++q) {
      const AverageSpan cols = column_span(t, q);
      double sum = 0;
      for (int64_t h = rows.begin; h < rows.end; ++h) {
        for (int64_t w = cols.begin; w < cols.end; ++w) {
          sum += static_cast<double>(A(x[h * in.row + w * in.col]));
        }
      }
      const A divisor(static_cast<A>(average_divisor(t, rows, cols)));
      y[p * out.row + q * out.col] =
          T(average_is_empty(rows, cols) ? A(0) : static_cast<A>(sum) / divisor);
    }
  }
}

// An input element is the sum, over the output rows above it, of the sums over those rows' windows.
template <class T>
void reference_dgrad_plane(const Pool2dProblem& t, const Pool2dArgs& a, int64_t n, int64_t c) {
  using A = accumulator_t<T>;
  const PlaneStrides in(t.layout, t.C, t.H, t.W), out(t.layout, t.C, t.P, t.Q);
  const T* dy = static_cast<const T*>(a.grad) + n * out.n + c * out.c;
  std::vector<A> sum(static_cast<size_t>(t.H * t.W), A(0)), line(static_cast<size_t>(t.W));
  for (int64_t p = 0; p < t.P; ++p) {
    const AverageSpan rows = row_span(t, p);
    std::fill(line.begin(), line.end(), A(0));
    for (int64_t q = 0; q < t.Q; ++q) {
      const AverageSpan cols = column_span(t, q);
      const A share =
          A(dy[p * out.row + q * out.col]) / static_cast<A>(average_divisor(t, rows, cols));
      for (int64_t w = cols.begin; w < cols.end; ++w) line[static_cast<size_t>(w)] += share;
    }
    for (int64_t h = rows.begin; h < rows.end; ++h) {
      for (int64_t w = 0; w < t.W; ++w) {
        sum[static_cast<size_t>(h * t.W + w)] += line[static_cast<size_t>(w)];
      }
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

// Tables by input column and windows as long as the padded plane are what the vector rows hold.
std::string refuse_window(const Pool2dProblem& t, const Device&) {
  if (t.kind == PoolKind::kAdaptiveAverage) return {};
  if (t.S > 65536) return "a window of " + std::to_string(t.S) + " columns is beyond 65536";
  if (t.S > t.W + 2 * t.pad_w || t.stride_w > t.W + 2 * t.pad_w) {
    return "the window's width or stride exceeds the padded row";
  }
  return {};
}

}  // namespace

void add_cpu_avg_pool2d_rows(KernelTable& table) {
  for (const char* op : {"avg_pool2d", "adaptive_avg_pool2d"}) {
    for (const Direction direction : {Direction::kFprop, Direction::kDgrad}) {
      const bool fprop = direction == Direction::kFprop;
      const auto add = [&](const char* arch, double bandwidth, auto launch) {
        table.pool2d.push_back(pool2d_row(op, arch, direction, bandwidth, launch));
        table.pool2d.back().supports = refuse_window;
      };
#if defined(__x86_64__)
      add("avx512", kAvx512Bandwidth, fprop ? avx512::avg_pool2d_fprop : avx512::avg_pool2d_dgrad);
      add("avx2", kAvx2Bandwidth, fprop ? avx2::avg_pool2d_fprop : avx2::avg_pool2d_dgrad);
#endif
      add("portable", kPortableBandwidth,
          fprop ? portable::avg_pool2d_fprop : portable::avg_pool2d_dgrad);
      table.pool2d.push_back(pool2d_row(
          op, "reference", direction, kReferenceBandwidth,
          [direction](const Pool2dProblem& t, const Pool2dArgs& a, const Context& context) {
            launch_reference(t, a, context, direction);
          }));
    }
  }
}

}  // namespace fastconv
