// Depthwise convolution with large filters: fprop, dgrad and wgrad. NCHW tensors are transposed on
// their way into the window, and the results on their way out.
//
// wgrad is the same computation with the roles exchanged: the filter's rows and columns are the
// grid, and the gradient of an image is the filter. Only rows and columns of taps that meet the
// image somewhere in a tile are multiplied.
//
// A sum is cut into pieces by the problem alone: any number of threads gives the same bits.
#include "cpu/conv2d_depthwise_window.h"

#include "cpu/conv2d_depthwise.h"

#define FASTCONV_KERNEL_FILE "cpu/conv2d_depthwise_window.inl"
#include "cpu/for_each_isa.h"

namespace fastconv {

template <class T>
const DepthwiseWindowOps<T>& depthwise_window_ops([[maybe_unused]] CpuIsa isa) {
#if defined(__x86_64__)
  if (isa == CpuIsa::kAvx512) return avx512::conv2d::depthwise_window<T>();
  if (isa == CpuIsa::kAvx2) return avx2::conv2d::depthwise_window<T>();
#endif
  return portable::conv2d::depthwise_window<T>();
}

namespace {

constexpr int64_t kWindowBytes = 512 << 10;  // half of a second-level cache
constexpr int64_t kMaxProducts = 64;         // of a sum in registers
constexpr int64_t kTransposed = 128;         // pixels whose sums are transposed together
constexpr int64_t kWantedUnits = 32;         // of wgrad, where there are as many images

// Taps [begin, end) of an axis, for some of its grid points.
struct Taps {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// The taps that lie inside the source for one of grid points [i0, i1), neighbours of which are
// `step` apart. (With a step of 1 or one point, all taps between them do as well.)
Taps taps_inside(const GatherAxis& a, int64_t i0, int64_t i1) {
  const auto outside = [&](int64_t t) {
    const int64_t first = i0 * a.step + a.first + t * a.hop;
    return first + (i1 - 1 - i0) * a.step < 0 || first >= a.size;
  };
  Taps taps = {0, a.taps};
  while (taps.begin < taps.end && outside(taps.begin)) ++taps.begin;
  while (taps.end > taps.begin && outside(taps.end - 1)) --taps.end;
  return taps;
}

template <class T>
class DepthwiseWindow {
 public:
  using Acc = accumulator_t<T>;

  DepthwiseWindow(const Conv2dProblem& problem, Direction direction, CpuIsa isa, int threads)
      : call_(problem, direction, isa, threads),
        ops_(depthwise_window_ops<T>(isa)),
        permute_sums_(conv2d_ops<Acc>(isa).permute),
        wgrad_(direction == Direction::kWgrad),
        nchw_(problem.layout == Layout::kNCHW),
        C_(problem.C),
        slabs_(divide_up(problem.C, ops_.lanes)) {
    if (wgrad_) {
      plans_.push_back(plan(wgrad_pass(problem)));
      parts_ = std::clamp<int64_t>(problem.N, 1, divide_up(kWantedUnits, slabs_));
    } else {
      for (const Pass& pass : passes_of(problem, direction)) plans_.push_back(plan(pass));
    }
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
    if (wgrad_) return run_wgrad(context);
    for_each_worker(context, [&](int64_t worker) {
      const int64_t offset = worker * worker_stride_;
      for (const Plan& plan : plans_) {
        const int64_t units = slabs_ * plan.pass.gather.N * plan.blocks;
        const Share share = share_of(units, worker, call_.threads);
        int64_t packed = -1;  // slab whose filter lies in filter_
        for (int64_t unit = share.begin; unit < share.end; ++unit) {
          const int64_t slab = unit / plan.blocks / plan.pass.gather.N;
          if (packed != slab) pack_filter(plan, slab, filter_ + offset);
          packed = slab;
          run_unit(plan, unit, slab, offset);
        }
      }
    });
  }

 private:
  struct Plan {
    Pass pass;
    ChannelWindow<T> window;
    int64_t blocks;   // units an image is cut into, by rows
    int64_t tiles;    // of an output row
    int64_t sums_ld;  // of one output row
    int64_t rows;     // output rows whose sums are finished together: an even number
    bool pairs;       // neighbouring output rows meet the same source rows
  };

  // The gradient is a filter of P x Q taps, `stride` apart, over a grid of R x S, `dilation` apart.
  static Pass wgrad_pass(const Conv2dProblem& p) {
    Pass pass = fprop_pass(p);
    pass.gather.h = {p.H, p.R, p.P(), p.dil_h, -p.pad_h, p.stride_h};
    pass.gather.w = {p.W, p.S, p.Q(), p.dil_w, -p.pad_w, p.stride_w};
    return pass;
  }

  Plan plan(const Pass& pass) const {
    const Gather& g = pass.gather;
    Plan plan = {pass, ChannelWindow<T>(g, ops_.lanes), 1, 0, 0, 2, false};
    const int64_t rows = wgrad_ ? g.h.count : plan.window.rows_within(kWindowBytes);
    plan.blocks = divide_up(g.h.count, rows);
    plan.tiles = divide_up(g.w.count, ops_.pixels);
    plan.sums_ld = plan.tiles * ops_.pixels * ops_.lanes;
    if (nchw_) plan.rows = round_up(divide_up(kTransposed, std::max<int64_t>(g.w.count, 1)), 2);
    plan.pairs = g.h.step % g.h.hop == 0;
    return plan;
  }

  void carve(Scratch& scratch) {
    int64_t window = 0, sums = 0, filter = 0;
    for (const Plan& plan : plans_) {
      const Gather& g = plan.pass.gather;
      const int64_t rows = divide_up(g.h.count, plan.blocks);
      // The last tile may reach beyond the window; what it finds there is dropped.
      window = std::max(window, plan.window.size(rows) + ops_.pixels * ops_.lanes);
      // In NCHW the sums and, after them, what they are transposed to.
      sums = std::max(sums, plan.rows * plan.sums_ld * (nchw_ ? 2 : 1));
      filter = std::max(filter, g.taps() * ops_.lanes);
    }
    if (wgrad_) {
      part_size_ = slabs_ * plans_[0].pass.gather.h.count * plans_[0].sums_ld;
      parts_sums_ = scratch.template take<Acc>(parts_ * part_size_);
    }
    for (int64_t worker = 0; worker < call_.threads; ++worker) {
      Acc* first = scratch.template take<Acc>(window);
      Acc* second = scratch.template take<Acc>(sums);
      Acc* third = scratch.template take<Acc>(filter);
      if (worker == 0) {
        window_ = first;
        sums_ = second;
        filter_ = third;
      }
      if (worker == 1) worker_stride_ = third - filter_;
    }
  }

  int64_t channels_of(int64_t slab) const { return std::min(ops_.lanes, C_ - slab * ops_.lanes); }

  // [tap][lane]; a pass's groups are its channels. Lanes beyond them are zero.
  void pack_filter(const Plan& plan, int64_t slab, Acc* filter) const {
    const Gather& g = plan.pass.gather;
    const int64_t* s = plan.pass.filter_stride;
    const int64_t L = ops_.lanes, channels = channels_of(slab);
    if (channels < L) std::fill_n(filter, g.taps() * L, Acc(0));
    call_.ops.permute({{channels, g.h.taps, g.w.taps, 1},
                       {plan.pass.group_stride, s[1], s[2], 0},
                       {1, g.w.taps * L, L, 0}},
                      call_.filter + plan.pass.filter_offset + slab * L * plan.pass.group_stride,
                      filter);
  }

  void copy_window(const Plan& plan, const T* source, int64_t image, Share rows, int64_t slab,
                   Acc* window) const {
    const int64_t first = slab * ops_.lanes, channels = channels_of(slab);
    if (nchw_) {
      plan.window.copy_planes(call_.ops.permute, source, image, rows, first, channels, window);
    } else {
      plan.window.copy(ops_.copy, source, image, rows, first, channels, window);
    }
  }

  // A block of output rows of one slab, two at a time.
  void run_unit(const Plan& plan, int64_t unit, int64_t slab, int64_t offset) const {
    const Gather& g = plan.pass.gather;
    const int64_t image = unit / plan.blocks % g.N;
    const Share rows = share_of(g.h.count, unit % plan.blocks, plan.blocks);
    const Acc* filter = filter_ + offset;
    Acc* sums = sums_ + offset;
    copy_window(plan, call_.source, image, rows, slab, window_ + offset);
    for (int64_t row = rows.begin; row < rows.end; row += plan.rows) {
      const int64_t end = std::min(row + plan.rows, rows.end);
      for (int64_t i = row; i < end; i += 2) {
        const int64_t count = std::min<int64_t>(2, end - i);
        const Acc* window = window_ + offset + (i - rows.begin) * g.h.step * plan.window.row_ld();
        if (nchw_) {
          Acc* to = sums + (i - row) * plan.sums_ld;
          for (int64_t j = 0; j < g.w.count; j += ops_.pixels) {
            run_tile(plan, i, count, j, window, filter,
                     {to + j * ops_.lanes, plan.sums_ld, ops_.lanes, false});
          }
        } else {
          run_rows(plan, image, i, count, slab, window, filter, sums);
        }
      }
      if (nchw_) store_planes(plan, image, row, end - row, slab, sums);
    }
  }

  // Output rows of NCHW from their sums. Only fprop has an epilogue, and its rows have no gaps.
  void store_planes(const Plan& plan, int64_t image, int64_t row, int64_t rows, int64_t slab,
                    Acc* sums) const {
    const OutputGrid& out = plan.pass.out;
    const int64_t L = ops_.lanes, channels = channels_of(slab), plane = out.H * out.W;
    const int64_t at =
        (image * C_ + slab * L) * plane + (out.first_h + row * out.step_h) * out.W + out.first_w;
    const bool plain =
        call_.epilogue_of(0, false).is_plain() && !(call_.fprop && call_.p.epilogue.residual);
    if (plain) {
      call_.ops.permute_back({{channels, rows, out.count_w, 1},
                              {1, plan.sums_ld, L, 0},
                              {plane, out.step_h * out.W, out.step_w, 0}},
                             sums, call_.out + at);
      return;
    }
    const int64_t pixels = rows * out.W;
    Acc* planes = sums + plan.rows * plan.sums_ld;
    permute_sums_({{channels, rows, out.W, 1}, {1, plan.sums_ld, L, 0}, {pixels, out.W, 1, 0}},
                  sums, planes);
    for (int64_t c = 0; c < channels; ++c) {
      RowEpilogue<T> epilogue = call_.epilogue_of(slab * L + c, false);
      call_.store(epilogue, {1, pixels, pixels, pixels, 1}, planes + c * pixels, at + c * plane);
    }
  }

  // One or two output rows. Where nothing follows the sum, whole tiles of whole vectors are written
  // in place.
  void run_rows(const Plan& plan, int64_t image, int64_t row, int64_t count, int64_t slab,
                const Acc* window, const Acc* filter, Acc* sums) const {
    const OutputGrid& out = plan.pass.out;
    const int64_t L = ops_.lanes, columns = out.count_w, channels = channels_of(slab);
    const int64_t line = image * out.H + out.first_h + row * out.step_h;
    const int64_t at = (line * out.W + out.first_w) * C_ + slab * L;
    const int64_t next = out.step_h * out.W * C_, pixel = out.step_w * C_;
    RowEpilogue<T> epilogue = call_.epilogue_of(slab * L, true);
    const bool in_place = sizeof(T) == sizeof(Acc) && channels == L && epilogue.is_plain() &&
                          !(call_.fprop && call_.p.epilogue.residual);
    int64_t stored = 0;  // pixels that are in the output
    for (int64_t j = 0; j < columns; j += ops_.pixels) {
      if (in_place && j + ops_.pixels <= columns) {
        Acc* D = reinterpret_cast<Acc*>(call_.out + at + j * pixel);
        run_tile(plan, row, count, j, window, filter, {D, next, pixel, false});
        stored = j + ops_.pixels;
      } else {
        run_tile(plan, row, count, j, window, filter, {sums + j * L, plan.sums_ld, L, false});
      }
    }
    for (int64_t i = 0; i < count && stored < columns; ++i) {
      call_.store(epilogue, {columns - stored, channels, L, pixel, 1},
                  sums + i * plan.sums_ld + stored * L, at + i * next + stored * pixel);
    }
  }

  struct Sums {
    Acc* D;
    int64_t row_ld, pixel_ld;
    bool accumulate;
  };

  // Grid rows `row` and, with count 2, row + 1; as many pixels from j on as a tile has.
  void run_tile(const Plan& plan, int64_t row, int64_t count, int64_t j, const Acc* window,
                const Acc* filter, Sums sums) const {
    const Gather& g = plan.pass.gather;
    const Taps columns = taps_inside(g.w, j, std::min(j + ops_.pixels, g.w.count));
    const Taps first = taps_inside(g.h, row, row + 1);
    window += j * ops_.lanes;
    if (count == 1) return add_taps(plan, columns, first, first, 1, window, filter, sums);
    const Taps second = taps_inside(g.h, row + 1, row + 2);
    // Tap r - lag of the second row lies on the source row of the first one's tap r.
    const int64_t lag = plan.pairs ? g.h.step / g.h.hop : 0;
    const Taps shifted = {second.begin + lag, second.end + lag};
    const bool overlap = std::max(first.begin, shifted.begin) < std::min(first.end, shifted.end);
    if (plan.pairs && overlap) {
      return add_taps(plan, columns, first, shifted, 2, window, filter, sums);
    }
    add_taps(plan, columns, first, first, 1, window, filter, sums);
    sums.D += sums.row_ld;
    add_taps(plan, columns, second, second, 1, window + g.h.step * plan.window.row_ld(), filter,
             sums);
  }

  // Filter rows `first` of the first output row and, with count 2, those that meet the same source
  // rows of the second: few enough at a time for a short sum.
  void add_taps(const Plan& plan, Taps columns, Taps first, Taps second, int64_t count,
                const Acc* window, const Acc* filter, Sums sums) const {
    const Gather& g = plan.pass.gather;
    const int64_t L = ops_.lanes;
    DepthwiseTile tile = {};
    tile.second_leads = second.begin < first.begin || second.end < first.end;
    tile.window_row = g.h.hop * plan.window.row_ld();
    tile.window_tap = g.w.hop * L;
    tile.filter_row = g.w.taps * L;
    tile.second = count == 2 ? -(g.h.step / g.h.hop) * tile.filter_row : 0;
    tile.row_ld = sums.row_ld;
    tile.pixel_ld = sums.pixel_ld;
    tile.accumulate = sums.accumulate;
    const Taps lead = {std::min(first.begin, second.begin), std::max(first.begin, second.begin)};
    const Taps tail = {std::min(first.end, second.end), std::max(first.end, second.end)};
    const Taps rows = {count == 1 ? first.begin : lead.begin, count == 1 ? first.end : tail.end};
    const auto within = [](Taps a, int64_t begin, int64_t end) {
      return std::max<int64_t>(0, std::min(a.end, end) - std::max(a.begin, begin));
    };
    const int64_t taps = std::min(columns.count(), kMaxProducts);
    bool any = false;
    for (int64_t s = columns.begin; s < columns.end; s += taps) {
      tile.taps = std::min(taps, columns.end - s);
      const int64_t most = kMaxProducts / taps;
      for (int64_t r = rows.begin; r < rows.end; r += most) {
        const int64_t end = std::min(r + most, rows.end);
        tile.lead = count == 1 ? end - r : within(lead, r, end);
        tile.both = count == 1 ? 0 : within({lead.end, tail.begin}, r, end);
        tile.tail = count == 1 ? 0 : within(tail, r, end);
        ops_.tile[count - 1](tile, window + plan.window.offset(0, s) + r * tile.window_row,
                             filter + (r * g.w.taps + s) * L, sums.D);
        tile.accumulate = true;
        any = true;
      }
    }
    if (!any && !sums.accumulate) ops_.tile[count - 1](tile, window, filter, sums.D);  // zeros
  }

  // Images are split into parts, each with sums of its own, which are added in order.
  void run_wgrad(const Context& context) const {
    const Plan& plan = plans_[0];
    const Gather& g = plan.pass.gather;
    const int64_t L = ops_.lanes, slab_size = g.h.count * plan.sums_ld;
    const auto* input = static_cast<const T*>(call_.args.input);
    for_each_worker(context, [&](int64_t worker) {
      const int64_t offset = worker * worker_stride_;
      const Share share = share_of(slabs_ * parts_, worker, call_.threads);
      for (int64_t unit = share.begin; unit < share.end; ++unit) {
        const int64_t slab = unit % slabs_, part = unit / slabs_;
        Acc* sums = parts_sums_ + part * part_size_ + slab * slab_size;
        std::fill_n(sums, slab_size, Acc(0));
        const Share images = share_of(g.N, part, parts_);
        for (int64_t n = images.begin; n < images.end; ++n) {
          copy_window(plan, input, n, {0, g.h.count}, slab, window_ + offset);
          pack_grad(g.taps(), n, slab, filter_ + offset);
          for (int64_t row = 0; row < g.h.count; row += 2) {
            const Acc* window = window_ + offset + row * g.h.step * plan.window.row_ld();
            for (int64_t j = 0; j < g.w.count; j += ops_.pixels) {
              run_tile(plan, row, std::min<int64_t>(2, g.h.count - row), j, window,
                       filter_ + offset,
                       {sums + row * plan.sums_ld + j * L, plan.sums_ld, L, true});
            }
          }
        }
      }
    });
    context.parallel_for(slabs_, [&](int64_t begin, int64_t end) {
      for (int64_t slab = begin; slab < end; ++slab) finish_wgrad(plan, slab, slab_size);
    });
  }

  // The gradient of an image as a filter.
  void pack_grad(int64_t pixels, int64_t image, int64_t slab, Acc* filter) const {
    const auto* grad = static_cast<const T*>(call_.args.grad) + image * pixels * C_;
    const int64_t L = ops_.lanes, channels = channels_of(slab);
    if (!nchw_) return ops_.copy(grad + slab * L, C_, pixels, channels, filter, L);
    if (channels < L) std::fill_n(filter, pixels * L, Acc(0));
    call_.ops.permute({{channels, pixels, 1, 1}, {pixels, 1, 0, 0}, {1, L, 0, 0}},
                      grad + slab * L * pixels, filter);
  }

  void finish_wgrad(const Plan& plan, int64_t slab, int64_t slab_size) const {
    const Gather& g = plan.pass.gather;
    Acc* total = parts_sums_ + slab * slab_size;
    for (int64_t part = 1; part < parts_; ++part) {
      const Acc* more = total + part * part_size_;
      for (int64_t i = 0; i < slab_size; ++i) total[i] += more[i];
    }
    const int64_t L = ops_.lanes, R = g.h.count, S = g.w.count;
    // With one channel a group, KCRS and KRSC are the same.
    call_.ops.permute_back(
        {{channels_of(slab), R, S, 1}, {1, plan.sums_ld, L, 0}, {R * S, S, 1, 0}}, total,
        static_cast<T*>(call_.args.out) + slab * L * R * S);
  }

  IgemmCall<T> call_;
  const DepthwiseWindowOps<T>& ops_;
  void (*const permute_sums_)(const Permutation&, const Acc*, Acc*);
  const bool wgrad_, nchw_;
  const int64_t C_, slabs_;
  std::vector<Plan> plans_;
  int64_t parts_ = 1, part_size_ = 0;
  Acc* parts_sums_ = nullptr;
  Acc* window_ = nullptr;
  Acc* sums_ = nullptr;
  Acc* filter_ = nullptr;
  int64_t worker_stride_ = 0;
};

}  // namespace

size_t conv2d_depthwise_window_workspace(const Conv2dProblem& p, Direction direction, CpuIsa isa,
                                         int threads) {
  return dispatch_dtype(p.dtype, [&](auto zero) {
    return DepthwiseWindow<decltype(zero)>(p, direction, isa, threads).workspace_bytes();
  });
}

void conv2d_depthwise_window(const Conv2dProblem& p, Direction direction, CpuIsa isa,
                             const Conv2dArgs& args, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto zero) {
    DepthwiseWindow<decltype(zero)>(p, direction, isa, context.threads).run(args, context);
  });
}

}  // namespace fastconv
