// Grouped convolution on NHWC tensors: fprop and dgrad. See conv2d_grouped.h for the idea.
//
// A unit of work is a bundle's part of some output rows of an image: the window under them is
// copied once, then every slab's every tile of pixels is computed from it.
//
// A result's sum is cut into pieces by the problem alone: any number of threads gives the same
// bits.
#include "cpu/conv2d_grouped.h"

#include <type_traits>
#include <utility>

#define FASTCONV_KERNEL_FILE "cpu/conv2d_grouped.inl"
#include "cpu/for_each_isa.h"

namespace fastconv {

template <class T>
const GroupedOps<T>& grouped_ops([[maybe_unused]] CpuIsa isa) {
#if defined(__x86_64__)
  if (isa == CpuIsa::kAvx512) return avx512::conv2d::grouped<T>();
  if (isa == CpuIsa::kAvx2) return avx2::conv2d::grouped<T>();
#endif
  return portable::conv2d::grouped<T>();
}
template const GroupedOps<float>& grouped_ops(CpuIsa);
template const GroupedOps<double>& grouped_ops(CpuIsa);
template const GroupedOps<Half>& grouped_ops(CpuIsa);
template const GroupedOps<BFloat16>& grouped_ops(CpuIsa);

namespace {

constexpr int64_t kWindowBytes = 128 << 10;  // beside the filters in a second-level cache
// Products summed in registers before the sum is added to the output's: 3 x 3 taps of 32 channels.
// From some 576 on a plain sum's error is felt.
constexpr int64_t kMaxProducts = 288;

template <class T>
class Grouped {
 public:
  using Acc = accumulator_t<T>;

  Grouped(const Conv2dProblem& problem, Direction direction, CpuIsa isa, int threads)
      : call_(problem, direction, isa, threads),
        ops_(grouped_ops<T>(isa)),
        lanes_(problem, direction, ops_.lanes),
        passes_(passes_of(problem, direction)) {
    for (const Pass& pass : passes_) plans_.push_back(plan(pass));
  }

  size_t workspace_bytes() {
    Scratch scratch;
    carve(scratch);
    return scratch.used();
  }

  void run(const Conv2dArgs& args, const Context& context) {
    call_.bind(args);
    Scratch scratch(args.workspace);
    carve(scratch);
    const int64_t slabs = lanes_.bundles * lanes_.slabs;
    for_each_pass_unit(
        context, plans_.size(), [&](size_t) { return slabs; },
        [&](size_t i, int64_t begin, int64_t end) {
          for (int64_t slab = begin; slab < end; ++slab) pack(passes_[i], plans_[i], slab);
        });
    for_each_worker(context, [&](int64_t worker) {
      const int64_t offset = worker * worker_stride_;
      for (size_t i = 0; i < plans_.size(); ++i) {
        run_share(passes_[i], plans_[i], worker, window_ + offset, sums_ + offset);
      }
    });
  }

 private:
  // Steps that one call of a tile takes: of one kind, and few enough to be one piece of the sum.
  struct Run {
    GroupedTaps kind;
    std::vector<int64_t> window, filter;
  };
  struct Plan {
    ChannelWindow<T> window;
    std::vector<Run> runs = {};
    int64_t blocks = 1;  // units an image is cut into, by rows
    int64_t window_size = 0, sums_size = 0;
    int64_t tap_ld = 0;
    int64_t packed_slab = 0;
    Acc* packed = nullptr;
  };

  Plan plan(const Pass& pass) const {
    const Gather& g = pass.gather;
    Plan plan{ChannelWindow<T>(g, lanes_.window)};
    const ChannelWindow<T>& window = plan.window;
    plan.blocks = divide_up(g.h.count, window.rows_within(kWindowBytes));
    // Few units are split further for the sake of the threads, but not into single rows: each
    // copies the span of the taps once more.
    while (g.N * lanes_.bundles * plan.blocks < 2 * call_.threads &&
           g.h.count / plan.blocks >= 4 * (window.span_h() + 1)) {
      plan.blocks *= 2;
    }
    // The last tile of the last row may reach beyond the window; what it finds there is dropped.
    plan.window_size =
        window.size(divide_up(g.h.count, plan.blocks)) + ops_.pixels[0] * g.w.step * lanes_.window;
    plan.sums_size = (g.w.count + ops_.pixels[0]) * ops_.lanes;
    plan.packed_slab = g.taps() * lanes_.channels * ops_.lanes;
    plan_runs(pass, plan);
    return plan;
  }

  // Taps of a filter row that are neighbours in the window go three or two at a time.
  void plan_runs(const Pass& pass, Plan& plan) const {
    const Gather& g = pass.gather;
    const bool neighbours = (g.w.hop == 1 || g.w.hop == -1) && g.w.step <= 2;
    const int64_t tap = lanes_.channels * ops_.lanes;  // filter elements
    plan.tap_ld = g.w.hop < 0 ? -tap : tap;
    const auto add = [&](GroupedTaps kind, int64_t r, int64_t first) {
      const int64_t most = std::max<int64_t>(1, kMaxProducts / (taps_of(kind) * lanes_.channels));
      if (plan.runs.empty() || plan.runs.back().kind != kind ||
          static_cast<int64_t>(plan.runs.back().window.size()) >= most) {
        plan.runs.push_back({kind, {}, {}});
      }
      plan.runs.back().window.push_back(plan.window.offset(r, first));
      plan.runs.back().filter.push_back((r * g.w.taps + first) * tap);
    };
    for (const GroupedTaps kind : {kThreeTaps, kThreeApart, kTwoTaps, kOneTap}) {
      for (int64_t r = 0; r < g.h.taps; ++r) {
        for (int64_t s = 0; s < g.w.taps;) {
          const GroupedTaps best = kind_of(g, neighbours, g.w.taps - s);
          const int64_t taps = taps_of(best);
          // In the window's order: a negative hop's first is the last of the run.
          if (best == kind) add(kind, r, g.w.hop < 0 ? s + taps - 1 : s);
          s += taps;
        }
      }
    }
  }
  static GroupedTaps kind_of(const Gather& g, bool neighbours, int64_t taps) {
    if (!neighbours) return kOneTap;
    if (taps >= 3) return g.w.step == 1 ? kThreeTaps : kThreeApart;
    return taps == 2 && g.w.step == 1 ? kTwoTaps : kOneTap;
  }

  void carve(Scratch& scratch) {
    int64_t window = 0, sums = 0;
    for (Plan& plan : plans_) {
      plan.packed = scratch.template take<Acc>(lanes_.bundles * lanes_.slabs * plan.packed_slab);
      window = std::max(window, plan.window_size);
      sums = std::max(sums, plan.sums_size);
    }
    for (int64_t worker = 0; worker < call_.threads; ++worker) {
      Acc* first = scratch.template take<Acc>(window);
      Acc* second = scratch.template take<Acc>(sums);
      if (worker == 0) {
        window_ = first;
        sums_ = second;
      }
      if (worker == 1) worker_stride_ = second - sums_;
    }
  }

  // [tap][channel][lane] of one slab.
  void pack(const Pass& pass, const Plan& plan, int64_t slab) const {
    const Gather& g = pass.gather;
    if (g.taps() == 0) return;
    const int64_t L = ops_.lanes, channel = slab * L, filters = std::min(lanes_.columns, L);
    const int64_t* s = pass.filter_stride;
    const T* from = call_.filter + pass.filter_offset +
                    channel / lanes_.columns * pass.group_stride + channel % lanes_.columns * s[0];
    Acc* to = plan.packed + slab * plan.packed_slab;
    const bool one_axis = s[1] == s[2] * g.w.taps;  // taps follow one another in the filter
    const int64_t taps = one_axis ? g.taps() : g.w.taps, tap = lanes_.channels * L;
    for (int64_t r = 0; r < (one_axis ? 1 : g.h.taps); ++r) {
      call_.ops.permute({{L / filters, filters, taps, lanes_.channels},
                         {pass.group_stride, s[0], s[2], s[3]},
                         {filters, 1, tap, L}},
                        from + r * s[1], to + r * taps * tap);
    }
  }

  // Units are (image, block of rows, bundle), the last fastest: neighbouring bundles read the same
  // cache lines.
  void run_share(const Pass& pass, const Plan& plan, int64_t worker, Acc* window, Acc* sums) const {
    const Gather& g = pass.gather;
    const Share share = share_of(g.N * plan.blocks * lanes_.bundles, worker, call_.threads);
    for (int64_t unit = share.begin; unit < share.end; ++unit) {
      const int64_t bundle = unit % lanes_.bundles, block = unit / lanes_.bundles % plan.blocks;
      const int64_t image = unit / lanes_.bundles / plan.blocks;
      const Share rows = share_of(g.h.count, block, plan.blocks);
      plan.window.copy(ops_.copy, call_.source, image, rows, bundle * lanes_.window, lanes_.window,
                       window);
      for (int64_t slab = bundle * lanes_.slabs; slab < (bundle + 1) * lanes_.slabs; ++slab) {
        for (int64_t row = rows.begin; row < rows.end; ++row) {
          const Acc* first = window + (row - rows.begin) * g.h.step * plan.window.row_ld();
          run_row(pass, plan, image, row, slab, first, sums);
        }
      }
    }
  }

  // One slab of one output row. Where nothing follows the sum, whole tiles of it are written in
  // place.
  void run_row(const Pass& pass, const Plan& plan, int64_t image, int64_t row, int64_t slab,
               const Acc* window, Acc* sums) const {
    const OutputGrid& out = pass.out;
    const int64_t L = ops_.lanes, count = out.count_w;
    const int64_t line = image * out.H + out.first_h + row * out.step_h;
    const int64_t at = (line * out.W + out.first_w) * out.C + slab * L, out_ld = out.step_w * out.C;
    RowEpilogue<T> epilogue = call_.epilogue_of(slab * L, true);
    const bool in_place = sizeof(T) == sizeof(Acc) && epilogue.is_plain() &&
                          !(call_.fprop && call_.p.epilogue.residual);
    int64_t stored = 0;  // pixels that are in the output
    for (int64_t j = 0; j < count;) {
      const bool is_short = count - j <= ops_.pixels[1];
      const int64_t pixels = ops_.pixels[is_short];
      const bool whole = in_place && j + pixels <= count;
      Acc* D = whole ? reinterpret_cast<Acc*>(call_.out + at + j * out_ld) : sums + j * L;
      if (whole && row + 1 < out.count_h) {
        // The tile below: its stores, to lines far apart, would otherwise wait for memory.
        const T* below = call_.out + at + out.step_h * out.W * out.C + j * out_ld;
        for (int64_t t = 0; t < pixels; ++t) __builtin_prefetch(below + t * out_ld, 1);
      }
      run_tile(pass, plan, slab, window + j * pass.gather.w.step * lanes_.window, is_short, D,
               whole ? out_ld : L);
      j += pixels;
      if (whole) stored = j;
    }
    if (stored < count) {
      call_.store(epilogue, {count - stored, L, L, out_ld, 1}, sums + stored * L,
                  at + stored * out_ld);
    }
  }

  void run_tile(const Pass& pass, const Plan& plan, int64_t slab, const Acc* window, bool is_short,
                Acc* D, int64_t ldd) const {
    const Acc* filter = plan.packed + slab * plan.packed_slab;
    GroupedTile tile = {0,
                        nullptr,
                        nullptr,
                        lanes_.channels,
                        plan.tap_ld,
                        lanes_.window,
                        pass.gather.w.step,
                        lanes_.columns,
                        ldd,
                        false};
    for (const Run& run : plan.runs) {
      tile.steps = static_cast<int64_t>(run.window.size());
      tile.window = run.window.data();
      tile.filter = run.filter.data();
      ops_.tile[run.kind][lanes_.permuted][is_short](tile, window, filter, D);
      tile.accumulate = true;
    }
    if (plan.runs.empty()) {
      for (int64_t t = 0; t < ops_.pixels[is_short]; ++t) {
        std::fill_n(D + t * ldd, ops_.lanes, Acc(0));
      }
    }
  }

  IgemmCall<T> call_;
  const GroupedOps<T>& ops_;
  const GroupedLanes lanes_;
  const std::vector<Pass> passes_;  // with rows: a 1x1 filter's too are cut into blocks of them
  std::vector<Plan> plans_;
  Acc* window_ = nullptr;
  Acc* sums_ = nullptr;
  int64_t worker_stride_ = 0;
};

}  // namespace

size_t conv2d_grouped_workspace(const Conv2dProblem& p, Direction direction, CpuIsa isa,
                                int threads) {
  return dispatch_dtype(p.dtype, [&](auto zero) {
    return Grouped<decltype(zero)>(p, direction, isa, threads).workspace_bytes();
  });
}

void conv2d_grouped(const Conv2dProblem& p, Direction direction, CpuIsa isa, const Conv2dArgs& args,
                    const Context& context) {
  dispatch_dtype(p.dtype, [&](auto zero) {
    Grouped<decltype(zero)>(p, direction, isa, context.threads).run(args, context);
  });
}

}  // namespace fastconv
