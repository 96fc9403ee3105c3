// What the two layouts' implicit GEMMs (fprop and dgrad) share: see conv2d_igemm_nhwc.cpp and
// conv2d_igemm_nchw.cpp.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/conv2d_passes.h"
#include "cpu/conv2d_scratch.h"

namespace fastconv {

// Reduction elements a call of gemm sums in registers. 256 x 32 filters x 4 bytes = 32 KiB, a
// first-level cache; adding a finished piece to the accumulators costs 1/64 of making it; and a sum
// of short sums has a small error.
constexpr int64_t kDepthBlock = 256;
// A block of work has at most this many filters, so that its accumulators stay in a second-level
// cache; few pixels split it further, for the sake of the threads, but not below the minimum, where
// gathering would be felt.
constexpr int64_t kMinFilters = 64;

// Rows of A this far apart (a page) meet in one set of the first-level cache: 14 of them do not fit
// its 8 ways (measured: 90 instead of 116 GFLOP/s).
template <class Acc>
constexpr bool is_aliased(int64_t ld) {
  return ld * static_cast<int64_t>(sizeof(Acc)) % 4096 == 0;
}

// One call: the problem, what it reads and writes, and the epilogue at a place of the output.
template <class T>
struct IgemmCall {
  using Acc = accumulator_t<T>;

  IgemmCall(const Conv2dProblem& problem, Direction direction, CpuIsa isa, int threads)
      : p(without_rows(problem)),
        fprop(direction == Direction::kFprop),
        ops(conv2d_ops<T>(isa)),
        threads(threads),
        passes(passes_of(p, direction)) {}

  void bind(const Conv2dArgs& arguments) {
    args = arguments;
    source = static_cast<const T*>(fprop ? args.input : args.grad);
    filter = static_cast<const T*>(args.filter);
    out = static_cast<T*>(args.out);
  }

  RowEpilogue<T> epilogue_of(int64_t channel, bool per_column) const {
    RowEpilogue<T> e;
    if (!fprop) return e;
    if (p.epilogue.scale) e.scale = static_cast<const Acc*>(args.scale) + channel;
    if (p.epilogue.shift) e.shift = static_cast<const Acc*>(args.shift) + channel;
    e.per_column = per_column;
    e.activation = p.epilogue.activation;
    e.slope = static_cast<Acc>(p.epilogue.slope);
    return e;
  }
  void store(RowEpilogue<T>& e, const RowBox& box, const Acc* sums, int64_t at) const {
    if (fprop && p.epilogue.residual) e.residual = static_cast<const T*>(args.residual) + at;
    ops.store(e, box, sums, out + at);
  }

  const Conv2dProblem p;
  const bool fprop;
  const Conv2dOps<T>& ops;
  const int64_t threads;
  const std::vector<Pass> passes;
  Conv2dArgs args;
  const T* source = nullptr;
  const T* filter = nullptr;
  T* out = nullptr;
};

// Filters a block: as many as allowed, fewer while there are not two units of work a thread.
inline int64_t filters_of_block(int64_t columns, int64_t multiple, int64_t most, int64_t units,
                                int64_t threads) {
  int64_t filters = std::min(round_up(std::max<int64_t>(columns, 1), multiple), most);
  while (units * divide_up(columns, filters) < 2 * threads && filters > kMinFilters) {
    filters = std::max(kMinFilters, round_up(filters / 2, multiple));
  }
  return filters;
}

// Reduction channels a unit of packing takes: long runs of the filter, yet work for every thread.
inline int64_t pack_block(int64_t channels, int64_t threads) {
  return std::clamp<int64_t>(round_up(divide_up(channels, 2 * threads), 16), 16, 128);
}

// Runs body(pass, begin, end) over the units of all passes at once: dgrad with a stride has many
// passes, each with little to pack.
template <class Units, class Body>
void for_each_pass_unit(const Context& context, size_t passes, const Units& units,
                        const Body& body) {
  int64_t total = 0;
  for (size_t i = 0; i < passes; ++i) total += units(i);
  context.parallel_for(total, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // of pass i
    for (size_t i = 0; i < passes && first < end; ++i) {
      const int64_t count = units(i);
      const int64_t from = std::max(begin, first), to = std::min(end, first + count);
      if (from < to) body(i, from - first, to - first);
      first += count;
    }
  });
}

// The part of a source axis that a run of grid points reads, cut out with zeros for padding.
struct WindowAxis {
  int64_t low, span;  // the first element under grid point 0; taps reach span elements further
  explicit WindowAxis(const GatherAxis& a)
      : low(a.first + std::min<int64_t>(0, (a.taps - 1) * a.hop)),
        span((a.taps - 1) * (a.hop < 0 ? -a.hop : a.hop)) {}
  static int64_t tap_offset(const GatherAxis& a, int64_t tap) {
    return a.first + tap * a.hop - WindowAxis(a).low;
  }
};

size_t conv2d_igemm_nhwc_workspace(const Conv2dProblem&, Direction, CpuIsa, int threads);
size_t conv2d_igemm_nchw_workspace(const Conv2dProblem&, Direction, CpuIsa, int threads);
void conv2d_igemm_nhwc(const Conv2dProblem&, Direction, CpuIsa, const Conv2dArgs&, const Context&);
void conv2d_igemm_nchw(const Conv2dProblem&, Direction, CpuIsa, const Conv2dArgs&, const Context&);
// fprop's filter packed ahead: see core/kernel_table.h.
size_t conv2d_igemm_nhwc_packed(const Conv2dProblem&, CpuIsa);
uint64_t conv2d_igemm_nhwc_packing(const Conv2dProblem&, CpuIsa);
void conv2d_igemm_nhwc_pack(const Conv2dProblem&, CpuIsa, const Conv2dArgs&, const Context&);

}  // namespace fastconv
