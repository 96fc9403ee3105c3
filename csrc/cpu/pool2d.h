// What max and average pooling share: where an element lies, which rows a window covers, and what a
// launch costs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>

#include "core/integers.h"
#include "core/kernel_table.h"
#include "cpu/streaming.h"

namespace fastconv {

// Strides, in elements, of a dense N x C x rows x cols tensor.
struct PlaneStrides {
  int64_t n, c, row, col;
  PlaneStrides(Layout layout, int64_t C, int64_t rows, int64_t cols)
      : n(C * rows * cols),
        c(layout == Layout::kNCHW ? rows * cols : 1),
        row(layout == Layout::kNCHW ? cols : cols * C),
        col(layout == Layout::kNCHW ? 1 : C) {}
};

// The first tap of a window along one axis that does not fall before the tensor's first element,
// when the window's first tap stands at `start`: 0, or ceil(-start / dilation).
inline int64_t first_tap(int64_t start, int64_t dilation) {
  return start >= 0 ? 0 : ceil_div(-start, dilation);
}

// One axis of an averaging window, by torch's rules.
struct AverageSpan {
  int64_t begin, end;  // inside the tensor: what is summed
  int64_t padded;  // elements of the window inside the padded tensor: count_include_pad's divisor
};

inline AverageSpan average_span(int64_t p, int64_t size, int64_t window, int64_t stride,
                                int64_t pad) {
  const int64_t begin = p * stride - pad;
  // A ceil_mode window may pass the padded edge; what lies beyond it is not counted.
  const int64_t end = std::min(begin + window, size + pad);
  return {std::max<int64_t>(begin, 0), std::min(end, size), end - begin};
}

// floor(p * size / outputs) to ceil((p + 1) * size / outputs), without overflowing the product:
// p * size = p * (size / outputs) * outputs + p * (size % outputs), and p < outputs.
inline AverageSpan adaptive_span(int64_t p, int64_t size, int64_t outputs) {
  const int64_t whole = size / outputs, rest = size % outputs;
  const int64_t begin = p * whole + p * rest / outputs;
  const int64_t end = (p + 1) * whole + ceil_div((p + 1) * rest, outputs);
  return {begin, end, end - begin};
}

inline AverageSpan row_span(const Pool2dProblem& t, int64_t p) {
  return t.kind == PoolKind::kAdaptiveAverage ? adaptive_span(p, t.H, t.P)
                                              : average_span(p, t.H, t.R, t.stride_h, t.pad_h);
}

inline AverageSpan column_span(const Pool2dProblem& t, int64_t q) {
  return t.kind == PoolKind::kAdaptiveAverage ? adaptive_span(q, t.W, t.Q)
                                              : average_span(q, t.W, t.S, t.stride_w, t.pad_w);
}

inline int64_t average_divisor(const Pool2dProblem& t, const AverageSpan& rows,
                               const AverageSpan& cols) {
  if (t.kind == PoolKind::kAverage && t.divisor_override != 0) return t.divisor_override;
  if (t.kind == PoolKind::kAverage && t.count_include_pad) return rows.padded * cols.padded;
  return (rows.end - rows.begin) * (cols.end - cols.begin);
}

// An averaging problem as its rows see it: adaptive windows that are all of one size and do not
// overlap are plain ones.
inline Pool2dProblem as_plain_windows(Pool2dProblem t) {
  t.dil_h = t.dil_w = 1;  // max pooling alone has it
  if (t.kind == PoolKind::kAdaptiveAverage) t.divisor_override = 0;
  if (t.kind != PoolKind::kAdaptiveAverage || t.P == 0 || t.Q == 0) return t;
  if (t.H % t.P != 0 || t.W % t.Q != 0) return t;
  t.kind = PoolKind::kAverage;
  t.R = t.stride_h = t.H / t.P;
  t.S = t.stride_w = t.W / t.Q;
  t.pad_h = t.pad_w = 0;
  t.count_include_pad = true;
  return t;
}

// One window over the whole plane, divided by the plane's size.
inline bool is_global(const Pool2dProblem& t) {
  return t.kind == PoolKind::kAverage && t.P == 1 && t.Q == 1 && t.R == t.H && t.S == t.W &&
         t.pad_h == 0 && t.pad_w == 0 && t.divisor_override == 0;
}

// A window with no element inside the tensor gives 0: 0 / divisor would be NaN when it counts none.
inline bool average_is_empty(const AverageSpan& rows, const AverageSpan& cols) {
  return rows.begin >= rows.end || cols.begin >= cols.end;
}

// The divisor as a row's factor times a column's, so that a vector of columns is divided at once.
// Each factor is exact in float, so their product rounds as the integer product would. Where a
// window has nothing, zero is divided, by anything.
template <class A>
A column_weight(const Pool2dProblem& t, const AverageSpan& span) {
  if (span.begin >= span.end || t.divisor_override != 0) return A(1);
  return static_cast<A>(t.count_include_pad ? span.padded : span.end - span.begin);
}
template <class A>
A row_weight(const Pool2dProblem& t, const AverageSpan& span) {
  return t.divisor_override != 0 ? static_cast<A>(t.divisor_override) : column_weight<A>(t, span);
}

// A row of the table for any dtype and layout; `variant` is an instruction set or "reference".
inline Pool2dKernel pool2d_row(
    const std::string& op, const std::string& variant, Direction direction,
    double gigabytes_per_second,
    std::function<void(const Pool2dProblem&, const Pool2dArgs&, const Context&)> launch) {
  Pool2dKernel row;
  row.name = op + "_" + variant + "_" + name_of(direction);
  row.op = op;
  row.direction = direction;
  row.backend = Backend::kCpu;
  row.arch = variant == "reference" ? "portable" : variant;
  row.dtypes = kAllDTypes;
  row.layouts = kAllLayouts;
  row.supports = [](const Pool2dProblem&, const Device&) { return std::string(); };
  row.cost = [gigabytes_per_second](const Pool2dProblem& t, const Device& device) {
    return streaming_cost(t.bytes(), gigabytes_per_second, device);
  };
  row.launch = std::move(launch);
  return row;
}

}  // namespace fastconv
