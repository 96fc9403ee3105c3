// Dense and grouped convolution as an implicit GEMM on NCHW tensors: fprop and dgrad.
//
// Rows of A are filters, read where they lie when they can be, and columns of B are pixels, so that
// D is written along the output's rows. B comes from one of two places:
//   planes: the part of each channel that a block of output rows reads, copied once with its
//     padding and with its columns sorted by their remainder modulo the stride: then a tap is that
//     plane at an offset, and row k of B is a pointer into it. Pixels are numbered along the
//     plane's rows, those between the end of an output row and the start of the next are computed
//     and dropped;
//   im2col, a copy for each tap, which drops nothing: many filters on small images, and 1x1.
//
// The result of an element depends on how its reduction is cut into pieces, which depends on the
// problem alone: any number of threads gives the same bits.
#include "cpu/conv2d_igemm.h"
#include "cpu/conv2d_planes.h"

namespace fastconv {
namespace {

constexpr int64_t kMaxFilters = 256;
constexpr int64_t kGatherPixels = 128;  // im2col: 256 x 144 elements gathered, 147 KiB in float
constexpr int64_t kMaxRow = 1024;       // planes: of a row with its padding
// Elements of D a block of planes may have: 64 KiB in float.
constexpr int64_t kBlockSums = 16384;
constexpr int64_t kMinBlockPixels = 192, kMaxBlockPixels = 1024;
// Cycles for copying an element of a run, where a vector multiply-add takes one, measured.
constexpr double copy_cycles(int64_t run) { return 0.35 + 16.0 / static_cast<double>(run); }

template <class T>
class IgemmNchw {
 public:
  using Acc = accumulator_t<T>;

  IgemmNchw(const Conv2dProblem& problem, Direction direction, CpuIsa isa, int threads)
      : call_(problem, direction, isa, threads) {
    for (const Pass& pass : call_.passes) plans_.push_back(plan(pass));
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
    for_each_pass_unit(
        context, plans_.size(), [&](size_t i) { return pack_units(call_.passes[i], plans_[i]); },
        [&](size_t i, int64_t begin, int64_t end) {
          pack_filter(call_.passes[i], plans_[i], begin, end);
        });
    for_each_worker(context, [&](int64_t worker) {
      const int64_t offset = worker * worker_stride_;
      const Buffers buffers = {gathered_ + offset, filters_ + offset, sums_ + offset};
      for (size_t i = 0; i < plans_.size(); ++i) {
        run_share(call_.passes[i], plans_[i], worker, buffers);
      }
    });
  }

 private:
  struct Plan {
    bool planes = false;
    int64_t units = 0, unit = 1,
            max_units = 1;            // of work: output rows (planes) or vectors of pixels
    int64_t filters = 1, chunks = 1;  // filters a block, blocks of them
    int64_t sums_ld = 0, gathered_ld = 0;
    int64_t gathered_size = 0;
    bool filter_in_place = false, channel_major = false;
    int64_t packed_ld = 0;
    Acc* packed = nullptr;
    PlaneAxis h, w;
    int64_t channels = 1;  // planes at once
    std::vector<int64_t> table;
  };
  struct Buffers {
    Acc* gathered;
    Acc* filters;  // a copy of a block of filters, where reading in place would be slow
    Acc* sums;
  };

  Plan plan(const Pass& pass) const {
    Plan plan;
    const Gather& g = pass.gather;
    plan.filters = std::clamp<int64_t>(pass.columns, 1, kMaxFilters);
    plan.planes = plan_planes(g, plan);
    if (!plan.planes) {
      plan.unit = call_.ops.tile_n;
      plan.units = divide_up(g.pixels(), plan.unit);
      plan.max_units = std::max<int64_t>(1, kGatherPixels / plan.unit);
      plan.gathered_ld = plan.sums_ld = padded_row<Acc>(plan.max_units * plan.unit);
      plan.gathered_size = std::min(kDepthBlock, g.depth()) * plan.gathered_ld;
    }
    plan.filters =
        filters_of_block(pass.columns, 1, kMaxFilters, plan.units * call_.p.G, call_.threads);
    plan.chunks = divide_up(pass.columns, plan.filters);
    // Planes want a channel's taps side by side. im2col takes either order: the filter's own in
    // fprop, so that it can be read in place or copied in long runs.
    const bool taps_last = call_.p.filter_layout == Layout::kNCHW || g.taps() == 1;
    plan.channel_major = plan.planes || (call_.fprop && taps_last);
    plan.filter_in_place =
        call_.fprop && sizeof(T) == sizeof(Acc) && plan.channel_major == taps_last;
    plan.packed_ld = plan.filter_in_place ? g.depth() : padded_row<Acc>(g.depth());
    return plan;
  }

  // Fills in the plan for planes and returns whether they cost less than im2col.
  bool plan_planes(const Gather& g, Plan& plan) const {
    if (g.taps() <= 1) return false;
    plan.w = PlaneAxis(g.w, g.w.count);
    if (plan.w.length > kMaxRow) return false;
    const int64_t pixels = std::clamp(kBlockSums / plan.filters, kMinBlockPixels, kMaxBlockPixels);
    const int64_t rows = std::clamp<int64_t>(pixels / plan.w.length, 1, g.h.count);
    plan.h = PlaneAxis(g.h, rows);
    const int64_t columns = (rows - 1) * plan.w.length + g.w.count;
    const int64_t plane = padded_row<Acc>(plan.h.total() * plan.w.total());
    plan.channels = std::clamp<int64_t>(kDepthBlock / g.taps(), 1, g.channels);

    const auto pixels_done = static_cast<double>(rows * g.w.count);
    const double fmas =
        static_cast<double>(plan.filters * g.taps()) / static_cast<double>(call_.ops.lanes);
    const double computed = static_cast<double>(round_up(columns, call_.ops.lanes)) / pixels_done;
    const double copied = static_cast<double>(plan.h.total() * plan.w.total()) / pixels_done;
    if (fmas * computed + copy_cycles(plan.w.length) * copied >
        fmas + copy_cycles(g.w.count) * static_cast<double>(g.taps())) {
      return false;
    }
    plan.unit = 1;
    plan.units = g.N * g.h.count;
    plan.max_units = rows;
    plan.gathered_ld = plane;
    // A last vector may begin at the last column under the last tap.
    plan.gathered_size = plan.channels * plane + call_.ops.lanes;
    plan.sums_ld = padded_row<Acc>(columns);
    for (int64_t c = 0; c < plan.channels; ++c) {
      for (int64_t r = 0; r < g.h.taps; ++r) {
        for (int64_t s = 0; s < g.w.taps; ++s) {
          plan.table.push_back(c * plane + tap_start(plan.h, plan.w, r, s));
        }
      }
    }
    return true;
  }
  void carve(Scratch& scratch) {
    int64_t gathered = 0, filters = 0, sums = 0;
    for (size_t i = 0; i < plans_.size(); ++i) {
      Plan& plan = plans_[i];
      if (!plan.filter_in_place) {
        plan.packed =
            scratch.template take<Acc>(call_.p.G * call_.passes[i].columns * plan.packed_ld);
      }
      gathered = std::max(gathered, plan.gathered_size);
      // store() reads whole vectors, from wherever a row of the output begins.
      sums = std::max(sums, plan.filters * plan.sums_ld + call_.ops.lanes);
      if (is_aliased<Acc>(plan.packed_ld)) {
        filters = std::max(filters, plan.filters * padded_row<Acc>(kDepthBlock));
      }
    }
    for (int64_t worker = 0; worker < call_.threads; ++worker) {
      Acc* first = scratch.template take<Acc>(gathered);
      Acc* second = scratch.template take<Acc>(filters);
      Acc* third = scratch.template take<Acc>(sums);
      if (worker == 0) {
        gathered_ = first;
        filters_ = second;
        sums_ = third;
      }
      if (worker == 1) worker_stride_ = third - sums_;
    }
  }

  // Rows [group][filter], and along them [channel][tap] or [tap][channel]. A unit of work is a
  // block of reduction channels of all filters: whichever way the filter lies, whole cache lines
  // are read.
  int64_t pack_units(const Pass& pass, const Plan& plan) const {
    const Gather& g = pass.gather;
    if (plan.filter_in_place || g.depth() == 0) return 0;
    return call_.p.G * divide_up(g.channels, pack_block(g.channels, call_.threads));
  }
  void pack_filter(const Pass& pass, const Plan& plan, int64_t begin, int64_t end) const {
    const Gather& g = pass.gather;
    const int64_t tap_stride = plan.channel_major ? 1 : g.channels;
    const int64_t channel_stride = plan.channel_major ? g.taps() : 1;
    const int64_t size = pack_block(g.channels, call_.threads);
    const int64_t blocks = divide_up(g.channels, size);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit / blocks, first = unit % blocks * size;
      const int64_t* s = pass.filter_stride;
      call_.ops.permute(
          {{pass.columns, g.h.taps, g.w.taps, std::min(size, g.channels - first)},
           {s[0], s[1], s[2], s[3]},
           {plan.packed_ld, tap_stride * g.w.taps, tap_stride, channel_stride}},
          call_.filter + pass.filter_offset + group * pass.group_stride + first * s[3],
          plan.packed + group * pass.columns * plan.packed_ld + first * channel_stride);
    }
  }

  struct Block {
    int64_t group, n0, n1;  // filters [n0, n1) of the group
    int64_t first, count;   // units
  };

  // Units of a pass are (group, block of filters, unit of pixels), the last fastest. A worker takes
  // a contiguous share and runs up to max_units of them at once.
  void run_share(const Pass& pass, const Plan& plan, int64_t worker, const Buffers& buffers) const {
    const Share share = share_of(call_.p.G * plan.chunks * plan.units, worker, call_.threads);
    for (int64_t unit = share.begin; unit < share.end;) {
      Block b;
      b.first = unit % plan.units;
      b.count = std::min({plan.max_units, plan.units - b.first, share.end - unit});
      b.group = unit / plan.units / plan.chunks;
      b.n0 = unit / plan.units % plan.chunks * plan.filters;
      b.n1 = std::min(b.n0 + plan.filters, pass.columns);
      if (plan.planes) {
        const int64_t rows = pass.gather.h.count;
        b.count = std::min(b.count, rows - b.first % rows);
        run_planes(pass, plan, b, buffers);
      } else {
        run_pixels(pass, plan, b, buffers);
      }
      unit += b.count;
    }
  }

  // Filters [n0, n1), reduction [k0, k1): in place, or a copy whose rows do not collide.
  const Acc* filter_rows(const Pass& pass, const Plan& plan, const Block& b, int64_t k0, int64_t k1,
                         const Buffers& buffers, int64_t& ld) const {
    ld = plan.packed_ld;
    const Acc* rows = plan.filter_in_place
                          ? reinterpret_cast<const Acc*>(call_.filter) + b.group * pass.group_stride
                          : plan.packed + b.group * pass.columns * ld;
    rows += b.n0 * ld + k0;
    if (!is_aliased<Acc>(ld)) return rows;
    const int64_t copy_ld = padded_row<Acc>(kDepthBlock);
    for (int64_t n = 0; n < b.n1 - b.n0; ++n) {
      std::copy_n(rows + n * ld, k1 - k0, buffers.filters + n * copy_ld);
    }
    ld = copy_ld;
    return buffers.filters;
  }

  void run_pixels(const Pass& pass, const Plan& plan, const Block& b,
                  const Buffers& buffers) const {
    Gather g = pass.gather;
    g.first_channel = b.group * g.channels;
    g.channel_major = plan.channel_major;
    const int64_t depth = g.depth(), filters = b.n1 - b.n0;
    const int64_t m0 = b.first * plan.unit;
    const int64_t m1 = std::min(m0 + b.count * plan.unit, g.pixels());
    const int64_t pieces = std::max<int64_t>(1, divide_up(depth, kDepthBlock));
    const int64_t no_offset = 0;
    GemmShape shape = {1, 0, &no_offset, 0, plan.gathered_ld, plan.sums_ld, false};
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const Share k = share_of(depth, piece, pieces);
      shape.length = k.end - k.begin;
      call_.ops.im2col(g, call_.source, m0, m1, k.begin, k.end, buffers.gathered, plan.gathered_ld);
      const Acc* A = filter_rows(pass, plan, b, k.begin, k.end, buffers, shape.lda);
      call_.ops.gemm(shape, filters, m1 - m0, A, buffers.gathered, buffers.sums);
      shape.accumulate = true;
    }
    if (depth == 0) std::fill_n(buffers.sums, filters * plan.sums_ld, Acc(0));
    for (int64_t n = 0; n < filters; ++n) {
      store_pixels(pass.out, b.group * pass.columns + b.n0 + n, m0, m1,
                   buffers.sums + n * plan.sums_ld);
    }
  }

  // Output rows [first, first + count) of all images' rows, which are of one image.
  void run_planes(const Pass& pass, const Plan& plan, const Block& b,
                  const Buffers& buffers) const {
    const Gather& g = pass.gather;
    const int64_t image = b.first / g.h.count, row = b.first % g.h.count;
    const int64_t filters = b.n1 - b.n0, taps = g.taps();
    const int64_t columns = (b.count - 1) * plan.w.length + g.w.count;
    GemmShape shape = {1, 0, nullptr, 0, 0, plan.sums_ld, false};
    for (int64_t c = 0; c < g.channels; c += plan.channels) {
      const int64_t channels = std::min(plan.channels, g.channels - c);
      copy_planes(plan, g, image, row, b.count, b.group * g.channels + c, channels,
                  buffers.gathered);
      const int64_t depth = channels * taps;  // more than a block only for a single huge filter
      const int64_t pieces = divide_up(depth, kDepthBlock);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const Share k = share_of(depth, piece, pieces);
        const Acc* A =
            filter_rows(pass, plan, b, c * taps + k.begin, c * taps + k.end, buffers, shape.lda);
        shape.length = k.end - k.begin;
        shape.offsets = plan.table.data() + k.begin;
        call_.ops.gemm_table(shape, filters, columns, A, buffers.gathered, buffers.sums);
        shape.accumulate = true;
      }
    }
    for (int64_t n = 0; n < filters; ++n) {
      store_rows(pass.out, b.group * pass.columns + b.n0 + n, image, row, b.count,
                 buffers.sums + n * plan.sums_ld, plan.w.length);
    }
  }

  // Each phase of a plane is a gather with a single tap.
  void copy_planes(const Plan& plan, const Gather& g, int64_t image, int64_t row, int64_t rows,
                   int64_t channel, int64_t channels, Acc* planes) const {
    Gather copy;
    copy.C = g.C;
    copy.channels = channels;
    copy.first_channel = channel;
    copy.channel_major = true;
    const int64_t length = plan.h.length - plan.max_units + rows;
    const T* source = call_.source + image * g.C * g.h.size * g.w.size;
    for (size_t h = 0; h < plan.h.phases.size(); ++h) {
      const int64_t first = row * g.h.step + WindowAxis(g.h).low + plan.h.phases[h];
      copy.h = {g.h.size, length, 1, g.h.step, first, 1};
      for (size_t w = 0; w < plan.w.phases.size(); ++w) {
        const int64_t left = WindowAxis(g.w).low + plan.w.phases[w];
        copy.w = {g.w.size, plan.w.length, 1, g.w.step, left, 1};
        Acc* to =
            planes + phase_start(plan.h, plan.w, static_cast<int64_t>(h), static_cast<int64_t>(w));
        call_.ops.im2col(copy, source, 0, length * plan.w.length, 0, channels, to,
                         plan.gathered_ld);
      }
    }
  }

  // `rows` grid rows, whose sums are `ld` apart.
  void store_rows(const OutputGrid& grid, int64_t channel, int64_t image, int64_t row, int64_t rows,
                  const Acc* sums, int64_t ld) const {
    RowEpilogue<T> epilogue = call_.epilogue_of(channel, false);
    const int64_t h = (image * grid.C + channel) * grid.H + grid.first_h + row * grid.step_h;
    call_.store(epilogue, {rows, grid.count_w, ld, grid.step_h * grid.W, grid.step_w}, sums,
                h * grid.W + grid.first_w);
  }

  // Pixels [m0, m1): a grid without gaps is one run an image, any other one run a row.
  void store_pixels(const OutputGrid& grid, int64_t channel, int64_t m0, int64_t m1,
                    const Acc* sums) const {
    RowEpilogue<T> epilogue = call_.epilogue_of(channel, false);
    const bool whole = grid.is_whole();
    const int64_t run = whole ? grid.H * grid.W : grid.count_w, runs = whole ? 1 : grid.count_h;
    const int64_t step = whole ? 1 : grid.step_w;
    for (int64_t m = m0; m < m1;) {
      const int64_t j = m % run, i = m / run % runs, n = m / run / runs;
      const int64_t length = std::min(run - j, m1 - m);
      const int64_t pixel = (grid.first_h + i * grid.step_h) * grid.W + grid.first_w + j * step;
      call_.store(epilogue, {1, length, 0, 0, step}, sums + (m - m0),
                  (n * grid.C + channel) * grid.H * grid.W + pixel);
      m += length;
    }
  }

  IgemmCall<T> call_;
  std::vector<Plan> plans_;
  Acc* gathered_ = nullptr;
  Acc* filters_ = nullptr;
  Acc* sums_ = nullptr;
  int64_t worker_stride_ = 0;
};

}  // namespace

size_t conv2d_igemm_nchw_workspace(const Conv2dProblem& p, Direction direction, CpuIsa isa,
                                   int threads) {
  return dispatch_dtype(p.dtype, [&](auto zero) {
    return IgemmNchw<decltype(zero)>(p, direction, isa, threads).workspace_bytes();
  });
}

void conv2d_igemm_nchw(const Conv2dProblem& p, Direction direction, CpuIsa isa,
                       const Conv2dArgs& args, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto zero) {
    IgemmNchw<decltype(zero)>(p, direction, isa, context.threads).run(args, context);
  });
}

}  // namespace fastconv
