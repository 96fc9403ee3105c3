// Dense and grouped convolution as an implicit GEMM on NHWC tensors: fprop and dgrad.
//
// Rows of A are pixels, B is the filter, packed once a call into panels as wide as the register
// tile, and a row of D is written as it lies. A comes from one of three places:
//   the tensor itself, for a 1x1 filter without stride or padding;
//   a window: the rows of one image that a block of output rows reads, copied once with their
//     padding, and every tap is a run of A at an offset of its own;
//   im2row, a copy for each tap: 1x1 with a stride, tiny images.
//
// The result of an element depends on how its reduction is cut into pieces, which depends on the
// problem alone: any number of threads gives the same bits.
#include <cmath>
#include <limits>

#include "cpu/conv2d_igemm.h"

namespace fastconv {
namespace {

constexpr int64_t kBlockPixels = 112;  // 8 tiles of 14: a panel of B is used that often
constexpr int64_t kMaxFilters = 512;   // 112 x 512 accumulators in float: 224 KiB
constexpr int64_t kWindowBytes = 384 << 10;
constexpr int64_t kChannelChunk = 64;    // of a window
constexpr int64_t kMergedChannels = 32;  // up to here a window's pixels touch: see Plan::merged
// A run of A is a row of pixels: tiles must not be left nearly empty by short rows.
constexpr double kLeastFill = 0.6;

enum class Source { kInPlace, kWindow, kIm2row };

template <class T>
class IgemmNhwc {
 public:
  using Acc = accumulator_t<T>;

  IgemmNhwc(const Conv2dProblem& problem, Direction direction, CpuIsa isa, int threads)
      : call_(problem, direction, isa, threads) {
    for (const Pass& pass : call_.passes) plans_.push_back(plan(pass));
  }

  size_t workspace_bytes() {
    Scratch scratch;
    carve(scratch);
    return scratch.used();
  }

  // The panels of a filter depend on how the reduction is cut, and on nothing else of the problem.
  uint64_t packing() const { return static_cast<uint64_t>(plans_.front().channel_chunk); }

  size_t packed_bytes() {
    Scratch scratch;
    carve_panels(scratch);
    return scratch.used();
  }

  void pack(const Conv2dArgs& args, const Context& context) {
    call_.bind(args);
    Scratch scratch(args.out);
    carve_panels(scratch);
    pack_filters(context);
  }

  void run(const Conv2dArgs& args, const Context& context) {
    call_.bind(args);
    Scratch scratch(args.workspace);
    carve(scratch);
    if (call_.p.filter_kept) {
      Scratch kept(const_cast<void*>(args.packed));  // only read
      carve_panels(kept);
    } else {
      pack_filters(context);
    }
    for_each_worker(context, [&](int64_t worker) {
      const int64_t offset = worker * worker_stride_;
      for (const Plan& plan : plans_) run_share(plan, worker, gathered_ + offset, sums_ + offset);
    });
  }

 private:
  void pack_filters(const Context& context) {
    for_each_pass_unit(
        context, plans_.size(), [&](size_t i) { return pack_units(call_.passes[i], plans_[i]); },
        [&](size_t i, int64_t begin, int64_t end) {
          pack_filter(call_.passes[i], plans_[i], begin, end);
        });
  }

  struct Plan {
    Gather gather;  // of a group
    OutputGrid out;
    int64_t groups = 1, columns = 0;
    int64_t merge = 1;  // this many of the problem's groups are one, with zeros between them
    Source source = Source::kIm2row;
    int64_t units = 0, unit = 1, max_units = 1;  // of work: output rows (window) or tiles of pixels
    int64_t filters = 1, chunks = 1;             // filters a block, blocks of them
    int64_t packed_group = 0;
    Acc* packed = nullptr;
    // The reduction is ordered (channel chunk, tap, channel).
    int64_t channel_chunk = 1;
    // Window: a pixel takes `pitch` elements and a row row_ld; a run of A begins at each offset.
    bool merged = false;  // the taps of a filter row lie side by side: one run of S * C
    int64_t window_w = 0, pitch = 0, row_ld = 0;
    std::vector<int64_t> offsets;
    int64_t gathered_size = 0;
  };

  // Groups with fewer filters than a vector has lanes share one: their filters become one block-
  // diagonal filter. No more is multiplied than with lanes left empty, and far less is gathered.
  int64_t groups_to_merge(int64_t columns) const {
    int64_t merge = 1;
    for (int64_t m = 2; m <= call_.p.G && m * columns <= call_.ops.lanes; ++m) {
      if (call_.p.G % m == 0) merge = m;
    }
    return merge;
  }

  Plan plan(const Pass& pass) const {
    Plan plan;
    plan.merge = groups_to_merge(pass.columns);
    plan.groups = call_.p.G / plan.merge;
    plan.columns = pass.columns * plan.merge;
    plan.out = pass.out;
    plan.gather = pass.gather;
    plan.gather.channels *= plan.merge;
    const Gather& g = plan.gather;
    plan.channel_chunk = std::max<int64_t>(1, g.channels);
    if (sizeof(T) == sizeof(Acc) && g.is_identity() && !is_aliased<Acc>(g.C)) {
      plan.source = Source::kInPlace;
    } else {
      plan_window(plan);
    }
    if (plan.source != Source::kWindow) {
      plan.unit = call_.ops.tile_m;
      plan.units = divide_up(g.pixels(), plan.unit);
      plan.max_units = kBlockPixels / plan.unit;
      plan.gathered_size = plan.source == Source::kInPlace
                               ? 0
                               : plan.max_units * plan.unit * padded_row<Acc>(kDepthBlock);
    }
    plan.filters = filters_of_block(plan.columns, call_.ops.tile_n, kMaxFilters,
                                    plan.units * plan.groups, call_.threads);
    plan.chunks = divide_up(plan.columns, plan.filters);
    plan.packed_group = round_up(plan.columns, call_.ops.tile_n) * g.depth();
    return plan;
  }

  // Whether a window pays: it copies every source pixel it covers once, im2row one for each tap.
  void plan_window(Plan& plan) const {
    const Gather& g = plan.gather;
    if (g.taps() <= 1) return;
    const WindowAxis h(g.h), w(g.w);
    const int64_t rows = std::clamp<int64_t>(kBlockPixels / g.w.count, 1, g.h.count);
    const int64_t window_h = (rows - 1) * g.h.step + h.span + 1;
    const int64_t window_w = (g.w.count - 1) * g.w.step + w.span + 1;
    const int64_t tiles = divide_up(g.w.count, call_.ops.tile_m);
    const double fill =
        static_cast<double>(g.w.count) / static_cast<double>(tiles * call_.ops.tile_m);
    const double copies =
        static_cast<double>(window_h * window_w) / static_cast<double>(rows * g.w.count);
    if (fill < kLeastFill || copies > 0.8 * static_cast<double>(g.taps())) return;

    const bool merged = g.channels == g.C && g.C <= kMergedChannels && g.w.hop == 1;
    const int64_t chunks = merged || plan.merge > 1 ? 1 : divide_up(g.channels, kChannelChunk);
    const int64_t chunk = divide_up(g.channels, chunks);
    // Pixels that touch make the taps of a filter row one run; otherwise they are kept apart by an
    // odd number of cache lines.
    const int64_t pitch = merged ? g.C : padded_row<Acc>(chunk);
    const int64_t row_ld =
        round_up(window_w * pitch, kLineBytes / static_cast<int64_t>(sizeof(Acc)));
    const int64_t size = window_h * row_ld;
    if (size * static_cast<int64_t>(sizeof(Acc)) > kWindowBytes) return;

    plan.source = Source::kWindow;
    plan.unit = 1;
    plan.units = g.N * g.h.count;
    plan.max_units = rows;
    plan.channel_chunk = chunk;
    plan.merged = merged;
    plan.window_w = window_w;
    plan.pitch = pitch;
    plan.row_ld = row_ld;
    plan.gathered_size = size;
    for (int64_t r = 0; r < g.h.taps; ++r) {
      for (int64_t s = 0; s < (merged ? 1 : g.w.taps); ++s) {
        plan.offsets.push_back(WindowAxis::tap_offset(g.h, r) * row_ld +
                               WindowAxis::tap_offset(g.w, s) * pitch);
      }
    }
  }

  void carve_panels(Scratch& scratch) {
    for (Plan& plan : plans_) {
      plan.packed = scratch.template take<Acc>(plan.groups * plan.packed_group);
    }
  }

  void carve(Scratch& scratch) {
    int64_t gathered = 0, sums = 0;
    if (!call_.p.filter_kept) carve_panels(scratch);
    for (const Plan& plan : plans_) {
      const int64_t pixels = plan.source == Source::kWindow ? plan.max_units * plan.gather.w.count
                                                            : plan.max_units * plan.unit;
      gathered = std::max(gathered, plan.gathered_size);
      sums = std::max(sums, pixels * padded_row<Acc>(plan.filters));
    }
    for (int64_t worker = 0; worker < call_.threads; ++worker) {
      Acc* first = scratch.template take<Acc>(gathered);
      Acc* second = scratch.template take<Acc>(sums);
      if (worker == 0) {
        gathered_ = first;
        sums_ = second;
      }
      if (worker == 1) worker_stride_ = second - sums_;
    }
  }

  // Panels [group][panel][channel chunk][tap][channel][tile_n]. A unit of work is a block of
  // reduction channels of all panels: whichever way the filter lies, whole cache lines are read.
  int64_t pack_units(const Pass& pass, const Plan& plan) const {
    if (plan.gather.depth() == 0) return 0;
    const int64_t channels = pass.gather.channels;  // of an unmerged group
    return call_.p.G * divide_up(channels, pack_block(channels, call_.threads));
  }
  void pack_filter(const Pass& pass, const Plan& plan, int64_t begin, int64_t end) const {
    const int64_t width = call_.ops.tile_n, depth = plan.gather.depth();
    const int64_t channels = pass.gather.channels;
    const int64_t full = plan.columns / width * width;
    const int64_t size = pack_block(channels, call_.threads), blocks = divide_up(channels, size);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit / blocks, block = unit % blocks * size;
      const int64_t last = std::min(block + size, channels);
      const T* from = call_.filter + pass.filter_offset + group * pass.group_stride;
      Acc* to = plan.packed + group / plan.merge * plan.packed_group;
      if (full < plan.columns) zero_panel(pass, plan, group, block, last, to + full * depth);
      for (int64_t c = block; c < last;) {
        const int64_t chunk = c / plan.channel_chunk * plan.channel_chunk;
        const int64_t next = std::min(chunk + plan.channel_chunk, last);
        pack_channels(pass, plan, c, next, 0, full / width, width, from, to);
        if (full < plan.columns) {
          // A merged group is one panel and one chunk; this group's part of it is a square on the
          // diagonal.
          const int64_t part = group % plan.merge * (channels * width + pass.columns);
          pack_channels(pass, plan, c, next, full, 1, pass.columns - full, from, to + part);
        }
        c = next;
      }
    }
  }

  // Reduction channels [c0, c1) of one chunk, `panels` panels of `lanes` filters from `first` on.
  void pack_channels(const Pass& pass, const Plan& plan, int64_t c0, int64_t c1, int64_t first,
                     int64_t panels, int64_t lanes, const T* filter, Acc* packed) const {
    if (panels == 0) return;
    const Gather& g = plan.gather;
    const int64_t width = call_.ops.tile_n;
    const int64_t chunk = c0 / plan.channel_chunk * plan.channel_chunk;
    const int64_t chunk_size = std::min(plan.channel_chunk, g.channels - chunk);
    const int64_t* s = pass.filter_stride;
    const bool one_axis = s[1] == s[2] * g.w.taps;  // taps follow one another in the filter
    const int64_t taps = one_axis ? g.taps() : g.w.taps;
    for (int64_t r = 0; r < (one_axis ? 1 : g.h.taps); ++r) {
      call_.ops.permute({{panels, lanes, taps, c1 - c0},
                         {width * s[0], s[0], s[2], s[3]},
                         {width * g.depth(), 1, chunk_size * width, width}},
                        filter + first * s[0] + r * s[1] + c0 * s[3],
                        packed + first * g.depth() +
                            (chunk * g.taps() + r * g.w.taps * chunk_size + c0 - chunk) * width);
    }
  }

  // The lanes beyond the filters, and in a merged group those of the other groups' filters, of this
  // unit's channels of the last panel.
  void zero_panel(const Pass& pass, const Plan& plan, int64_t group, int64_t c0, int64_t c1,
                  Acc* panel) const {
    const int64_t width = call_.ops.tile_n;
    const int64_t shift = group % plan.merge * pass.gather.channels;
    for (int64_t c = c0; c < c1; ++c) {
      const int64_t at = c + shift, chunk = at / plan.channel_chunk * plan.channel_chunk;
      const int64_t chunk_size = std::min(plan.channel_chunk, plan.gather.channels - chunk);
      for (int64_t tap = 0; tap < plan.gather.taps(); ++tap) {
        std::fill_n(panel + (chunk * plan.gather.taps() + tap * chunk_size + at - chunk) * width,
                    width, Acc(0));
      }
    }
  }

  struct Block {
    int64_t group, n0, n1;  // filters [n0, n1) of the group
    int64_t m0, m1;         // pixels
  };

  // Units of a pass are (group, block of filters, unit of pixels), the last fastest. A worker takes
  // a contiguous share and runs up to max_units of them at once.
  void run_share(const Plan& plan, int64_t worker, Acc* gathered, Acc* sums) const {
    const Share share = share_of(plan.groups * plan.chunks * plan.units, worker, call_.threads);
    for (int64_t unit = share.begin; unit < share.end;) {
      const int64_t first = unit % plan.units, chunk = unit / plan.units % plan.chunks;
      int64_t count = std::min({plan.max_units, plan.units - first, share.end - unit});
      Block block;
      block.group = unit / plan.units / plan.chunks;
      block.n0 = chunk * plan.filters;
      block.n1 = std::min(block.n0 + plan.filters, plan.columns);
      if (plan.source == Source::kWindow) {
        const int64_t image_rows = plan.gather.h.count, row = first % image_rows;
        count = std::min(count, image_rows - row);
        block.m0 = first * plan.gather.w.count;
        block.m1 = (first + count) * plan.gather.w.count;
        run_window(plan, block, first / image_rows, row, count, gathered, sums);
      } else {
        block.m0 = first * plan.unit;
        block.m1 = std::min(block.m0 + count * plan.unit, plan.gather.pixels());
        run_pixels(plan, block, gathered, sums);
      }
      if (plan.gather.depth() == 0) {
        std::fill_n(sums, (block.m1 - block.m0) * padded_row<Acc>(plan.filters), Acc(0));
      }
      if (plan.merge > 1) repair_block(plan, block, sums);
      store_block(plan, block, sums);
      unit += count;
    }
  }

  void run_pixels(const Plan& plan, const Block& b, Acc* gathered, Acc* sums) const {
    Gather g = plan.gather;
    g.first_channel = b.group * g.channels;
    const int64_t depth = g.depth(), width = call_.ops.tile_n;
    const int64_t pieces = std::max<int64_t>(1, divide_up(depth, kDepthBlock));
    const Acc* panels = plan.packed + b.group * plan.packed_group;
    const int64_t no_offset = 0;
    GemmShape shape = {1, 0, &no_offset, 0, width, padded_row<Acc>(plan.filters), false};
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const Share k = share_of(depth, piece, pieces);
      const Acc* A = gathered;
      shape.length = k.end - k.begin;
      if (plan.source == Source::kInPlace) {
        shape.lda = g.C;
        A = reinterpret_cast<const Acc*>(call_.source) + b.m0 * g.C + g.first_channel + k.begin;
      } else {
        shape.lda = padded_row<Acc>(kDepthBlock);
        call_.ops.im2row(g, call_.source, b.m0, b.m1, k.begin, k.end, gathered, shape.lda);
      }
      for (int64_t n = b.n0; n < b.n1; n += width) {
        call_.ops.gemm(shape, b.m1 - b.m0, std::min(width, b.n1 - n), A,
                       panels + n * depth + k.begin * width, sums + n - b.n0);
      }
      shape.accumulate = true;
    }
  }

  // Output rows [row, row + rows) of one image.
  void run_window(const Plan& plan, const Block& b, int64_t image, int64_t row, int64_t rows,
                  Acc* window, Acc* sums) const {
    const Gather& g = plan.gather;
    const int64_t width = call_.ops.tile_n, taps = g.taps(), depth = g.depth();
    const Acc* panels = plan.packed + b.group * plan.packed_group;
    const int64_t sums_ld = padded_row<Acc>(plan.filters);
    GemmShape shape = {0, 0, nullptr, g.w.step * plan.pitch, width, sums_ld, false};
    for (int64_t c = 0; c < g.channels; c += plan.channel_chunk) {
      const int64_t chunk = std::min(plan.channel_chunk, g.channels - c);
      copy_window(plan, image, row, rows, b.group * g.channels + c, chunk, window);
      shape.length = plan.merged ? g.w.taps * chunk : chunk;
      const auto runs = static_cast<int64_t>(plan.offsets.size());
      const int64_t pieces = divide_up(runs, std::max<int64_t>(1, kDepthBlock / shape.length));
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const Share run = share_of(runs, piece, pieces);
        shape.segments = run.end - run.begin;
        shape.offsets = plan.offsets.data() + run.begin;
        for (int64_t n = b.n0; n < b.n1; n += width) {
          const Acc* B = panels + n * depth + (c * taps + run.begin * shape.length) * width;
          for (int64_t i = 0; i < rows; ++i) {
            call_.ops.gemm(shape, g.w.count, std::min(width, b.n1 - n),
                           window + i * g.h.step * plan.row_ld, B,
                           sums + i * g.w.count * sums_ld + n - b.n0);
          }
        }
        shape.accumulate = true;
      }
    }
  }

  // A window is itself a gather with a single tap, or, where its pixels touch, a gather of one
  // pixel a row with as many taps as the window is wide.
  void copy_window(const Plan& plan, int64_t image, int64_t row, int64_t rows, int64_t channel,
                   int64_t channels, Acc* window) const {
    const Gather& g = plan.gather;
    const WindowAxis h(g.h), w(g.w);
    const int64_t window_h = (rows - 1) * g.h.step + h.span + 1;
    Gather copy;
    copy.C = g.C;
    copy.channels = channels;
    copy.first_channel = channel;
    copy.h = {g.h.size, window_h, 1, 1, row * g.h.step + h.low, 1};
    const T* source = call_.source + image * g.h.size * g.w.size * g.C;
    if (plan.merged) {
      copy.w = {g.w.size, 1, plan.window_w, 1, w.low, 1};
      call_.ops.im2row(copy, source, 0, window_h, 0, plan.window_w * channels, window, plan.row_ld);
      return;
    }
    copy.w = {g.w.size, plan.window_w, 1, 1, w.low, 1};
    for (int64_t i = 0; i < window_h; ++i) {
      call_.ops.im2row(copy, source, i * plan.window_w, (i + 1) * plan.window_w, 0, channels,
                       window + i * plan.row_ld, plan.pitch);
    }
  }

  // In merged groups an infinity or a NaN of one group meets the zeros of the others: 0 * inf is
  // NaN. So sums that are not finite are computed again from their own group's channels.
  void repair_block(const Plan& plan, const Block& b, Acc* sums) const {
    const int64_t sums_ld = padded_row<Acc>(plan.filters);
    for (int64_t m = b.m0; m < b.m1; ++m, sums += sums_ld) {
      int suspect = 0;  // a branch a row, not one an element
      for (int64_t n = 0; n < b.n1 - b.n0; ++n) {
        suspect |= !(std::abs(sums[n]) <= std::numeric_limits<Acc>::max());
      }
      if (suspect == 0) continue;
      for (int64_t n = 0; n < b.n1 - b.n0; ++n) {
        if (!std::isfinite(sums[n])) sums[n] = sum_of_one(plan, b.group, m, b.n0 + n);
      }
    }
  }
  Acc sum_of_one(const Plan& plan, int64_t group, int64_t m, int64_t n) const {
    const Gather& g = plan.gather;
    const int64_t channels = g.channels / plan.merge, part = n / (plan.columns / plan.merge);
    const int64_t j = m % g.w.count, i = m / g.w.count % g.h.count;
    const T* image = call_.source + m / g.w.count / g.h.count * g.h.size * g.w.size * g.C;
    const Acc* panel = plan.packed + group * plan.packed_group;  // a merged group has one
    Acc sum = 0;
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      const int64_t h = i * g.h.step + g.h.first + tap / g.w.taps * g.h.hop;
      const int64_t w = j * g.w.step + g.w.first + tap % g.w.taps * g.w.hop;
      if (h < 0 || h >= g.h.size || w < 0 || w >= g.w.size) continue;
      for (int64_t c = part * channels; c < (part + 1) * channels; ++c) {
        sum += static_cast<Acc>(image[(h * g.w.size + w) * g.C + group * g.channels + c]) *
               panel[(tap * g.channels + c) * call_.ops.tile_n + n];
      }
    }
    return sum;
  }

  // Pixels that follow one another at an even distance are stored at once: all of them where the
  // grid has no gaps, a row of the grid otherwise.
  void store_block(const Plan& plan, const Block& b, const Acc* sums) const {
    const OutputGrid& out = plan.out;
    const int64_t channel = b.group * plan.columns + b.n0;
    const int64_t sums_ld = padded_row<Acc>(plan.filters);
    RowEpilogue<T> epilogue = call_.epilogue_of(channel, true);
    for (int64_t m = b.m0; m < b.m1;) {
      RowBox box = {b.m1 - m, b.n1 - b.n0, sums_ld, out.C, 1};
      int64_t pixel = m;
      if (!out.is_whole()) {
        const int64_t j = m % out.count_w, i = m / out.count_w % out.count_h;
        const int64_t row = m / out.count_w / out.count_h * out.H + out.first_h + i * out.step_h;
        pixel = row * out.W + out.first_w + j * out.step_w;
        box.rows = std::min(box.rows, out.count_w - j);
        box.out_ld = out.step_w * out.C;
      }
      call_.store(epilogue, box, sums + (m - b.m0) * sums_ld, pixel * out.C + channel);
      m += box.rows;
    }
  }

  IgemmCall<T> call_;
  std::vector<Plan> plans_;
  Acc* gathered_ = nullptr;
  Acc* sums_ = nullptr;
  int64_t worker_stride_ = 0;
};

}  // namespace

size_t conv2d_igemm_nhwc_workspace(const Conv2dProblem& p, Direction direction, CpuIsa isa,
                                   int threads) {
  return dispatch_dtype(p.dtype, [&](auto zero) {
    return IgemmNhwc<decltype(zero)>(p, direction, isa, threads).workspace_bytes();
  });
}

size_t conv2d_igemm_nhwc_packed(const Conv2dProblem& p, CpuIsa isa) {
  return dispatch_dtype(p.dtype, [&](auto zero) {
    return IgemmNhwc<decltype(zero)>(p, Direction::kFprop, isa, 1).packed_bytes();
  });
}

uint64_t conv2d_igemm_nhwc_packing(const Conv2dProblem& p, CpuIsa isa) {
  return dispatch_dtype(p.dtype, [&](auto zero) {
    return IgemmNhwc<decltype(zero)>(p, Direction::kFprop, isa, 1).packing();
  });
}

void conv2d_igemm_nhwc_pack(const Conv2dProblem& p, CpuIsa isa, const Conv2dArgs& args,
                            const Context& context) {
  dispatch_dtype(p.dtype, [&](auto zero) {
    IgemmNhwc<decltype(zero)>(p, Direction::kFprop, isa, context.threads).pack(args, context);
  });
}

void conv2d_igemm_nhwc(const Conv2dProblem& p, Direction direction, CpuIsa isa,
                       const Conv2dArgs& args, const Context& context) {
  dispatch_dtype(p.dtype, [&](auto zero) {
    IgemmNhwc<decltype(zero)>(p, direction, isa, context.threads).run(args, context);
  });
}

}  // namespace fastconv
