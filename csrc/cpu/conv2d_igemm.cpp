// Dense and grouped convolution as an implicit GEMM: fprop and dgrad. (wgrad: conv2d_wgrad.cpp.)
//
// NHWC: rows of A are pixels, gathered block by block (or read where they lie, for 1x1), and B is
// the filter, packed once a call into panels as wide as the register tile.
// NCHW: rows of A are filters, read where they lie when they can be, and columns of B are pixels,
// gathered block by block: the output is then written along its rows.
// Either way a pixel block is gathered once for all filters, in pieces of the reduction that stay
// in the second-level cache, and the epilogue runs on a block while it is still there.
//
// The result of an element depends on the pieces of its reduction alone, which depend on the
// problem alone: any number of threads gives the same bits.
#include <algorithm>

#include "cpu/conv2d_passes.h"
#include "cpu/conv2d_rows.h"
#include "cpu/conv2d_scratch.h"

namespace fastconv {
namespace {

// Reduction elements a piece. 256 x 32 filters x 4 bytes = 32 KiB, a first-level cache, and adding
// a finished piece to the accumulators costs 1/64 of making it.
constexpr int64_t kDepthBlock = 256;
// A block: 112 pixels (NHWC) or 128 (NCHW) by at most 512 or 256 filters. The largest: 112 x 272
// gathered + 112 x 512 accumulators, or 256 x 144 gathered + 256 x 144 accumulators, in floats: 350
// and 295 KB.
constexpr int64_t kRowTiles = 8;     // of 14 pixels
constexpr int64_t kColumnTiles = 4;  // of 32 pixels
constexpr int64_t kMaxRowFilters = 512;
constexpr int64_t kMaxColumnFilters = 256;
// Below this many filters a block, gathering is felt: 128 filters are 8 multiply-adds a gathered
// vector element.
constexpr int64_t kMinFilters = 64;

template <class T>
class Igemm {
 public:
  using Acc = accumulator_t<T>;

  Igemm(const Conv2dProblem& problem, Direction direction, CpuIsa isa, int threads)
      : p_(without_rows(problem)),
        direction_(direction),
        ops_(conv2d_ops<T>(isa)),
        threads_(threads),
        nhwc_(p_.layout == Layout::kNHWC),
        passes_(passes_of(p_, direction)) {
    for (const Pass& pass : passes_) plans_.push_back(plan(pass));
  }

  size_t workspace_bytes() {
    Scratch scratch;
    carve(scratch);
    return scratch.used();
  }

  void run(const Conv2dArgs& args, const Context& context) {
    if (p_.N == 0) return;
    args_ = args;
    source_ = static_cast<const T*>(direction_ == Direction::kFprop ? args.input : args.grad);
    filter_ = static_cast<const T*>(args.filter);
    Scratch scratch(args.workspace);
    carve(scratch);
    pack_filters(context);
    for_each_worker(context, [&](int64_t worker) {
      const Buffers buffers = buffers_of(worker);
      for (size_t i = 0; i < passes_.size(); ++i) run_share(passes_[i], plans_[i], worker, buffers);
    });
  }

 private:
  struct Plan {
    int64_t depth_block;
    int64_t tile, max_tiles;  // pixels a unit of work, units a block
    int64_t tiles;            // units of all pixels
    int64_t filters, chunks;  // filters a block, and how many such blocks
    bool gather_in_place;     // NHWC: A is the tensor itself
    bool filter_in_place;     // NCHW: A is the filter itself
    bool channel_major;
    int64_t packed_ld;     // NCHW: row length of the packed filter
    int64_t packed_group;  // elements of one group's packed filter
    Acc* packed = nullptr;
  };
  struct Buffers {
    Acc* gathered;
    Acc* filters;  // NCHW: a copy of a block of filters, where reading in place would be slow
    Acc* sums;
  };

  static constexpr bool kConverts = sizeof(T) != sizeof(Acc);

  Plan plan(const Pass& pass) const {
    Plan plan;
    const Gather& g = pass.gather;
    const int64_t depth = g.depth();
    const int64_t pieces = std::max<int64_t>(1, divide_up(depth, kDepthBlock));
    plan.depth_block = round_up(divide_up(depth, pieces), 4);
    plan.tile = nhwc_ ? ops_.tile_m : ops_.tile_n;
    plan.max_tiles = nhwc_ ? kRowTiles * 14 / plan.tile : kColumnTiles * 32 / plan.tile;
    plan.tiles = divide_up(g.pixels(), plan.tile);
    plan.filters = std::min(round_up(std::max<int64_t>(pass.columns, 1), nhwc_ ? ops_.tile_n : 1),
                            nhwc_ ? kMaxRowFilters : kMaxColumnFilters);
    // Few pixels: split the filters, so that every thread has work.
    while (plan.tiles * divide_up(pass.columns, plan.filters) * p_.G < 2 * threads_ &&
           plan.filters > kMinFilters) {
      plan.filters = std::max(kMinFilters, round_up(plan.filters / 2, ops_.tile_n));
    }
    plan.chunks = divide_up(pass.columns, plan.filters);
    plan.gather_in_place = nhwc_ && !kConverts && g.is_identity() && !is_aliased(g.C);
    const bool flat_filter = direction_ == Direction::kFprop && !kConverts;
    plan.filter_in_place = !nhwc_ && flat_filter;
    plan.channel_major = plan.filter_in_place && p_.filter_layout == Layout::kNCHW;
    plan.packed_ld = padded_row<Acc>(depth);
    plan.packed_group =
        nhwc_ ? round_up(pass.columns, ops_.tile_n) * depth : pass.columns * plan.packed_ld;
    return plan;
  }

  // Rows of A this far apart (a page) meet in one set of the first-level cache: 14 of them do not
  // fit its 8 ways (measured: 90 instead of 116 GFLOP/s).
  static bool is_aliased(int64_t ld) { return ld * static_cast<int64_t>(sizeof(Acc)) % 4096 == 0; }

  void carve(Scratch& scratch) {
    int64_t gathered = 0, filters = 0, sums = 0;
    for (size_t i = 0; i < plans_.size(); ++i) {
      Plan& plan = plans_[i];
      if (!plan.filter_in_place) plan.packed = scratch.template take<Acc>(p_.G * plan.packed_group);
      const int64_t pixels = plan.max_tiles * plan.tile;
      if (nhwc_) {
        gathered = std::max(gathered, pixels * padded_row<Acc>(plan.depth_block));
        sums = std::max(sums, pixels * padded_row<Acc>(plan.filters));
      } else {
        gathered = std::max(gathered, plan.depth_block * padded_row<Acc>(pixels));
        sums = std::max(sums, plan.filters * padded_row<Acc>(pixels));
        if (plan.filter_in_place) {
          filters = std::max(filters, plan.filters * padded_row<Acc>(plan.depth_block));
        }
      }
    }
    for (int worker = 0; worker < threads_; ++worker) {
      Buffers buffers;
      buffers.gathered = scratch.template take<Acc>(gathered);
      buffers.filters = scratch.template take<Acc>(filters);
      buffers.sums = scratch.template take<Acc>(sums);
      if (worker == 0) buffers_ = buffers;
      if (worker == 1) worker_stride_ = buffers.gathered - buffers_.gathered;
    }
  }
  Buffers buffers_of(int64_t worker) const {
    const int64_t offset = worker * worker_stride_;
    return {buffers_.gathered + offset, buffers_.filters + offset, buffers_.sums + offset};
  }

  void pack_filters(const Context& context) const {
    for (size_t i = 0; i < passes_.size(); ++i) {
      const Pass& pass = passes_[i];
      const Plan& plan = plans_[i];
      if (plan.filter_in_place || pass.gather.depth() == 0) continue;
      const int64_t width = ops_.tile_n;
      const int64_t panels = divide_up(pass.columns, width);
      context.parallel_for(p_.G * panels, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t g = unit / panels, first = unit % panels * width;
          const int64_t columns = std::min(width, pass.columns - first);
          const T* from =
              filter_ + pass.filter_offset + g * pass.group_stride + first * pass.filter_stride[0];
          Acc* to = plan.packed + g * plan.packed_group;
          const int64_t channels = pass.gather.channels;
          if (nhwc_) {
            to += first * pass.gather.depth();
            if (columns < width) std::fill_n(to, width * pass.gather.depth(), Acc(0));
            ops_.permute(filter_permutation(pass, columns, 1, channels * width, width), from, to);
          } else {
            to += first * plan.packed_ld;
            ops_.permute(filter_permutation(pass, columns, plan.packed_ld, channels, 1), from, to);
          }
        }
      });
    }
  }

  // Units of a pass are (group, block of filters, pixel tile), tiles fastest. A worker takes a
  // contiguous share and runs up to max_tiles of them at once.
  void run_share(const Pass& pass, const Plan& plan, int64_t worker, const Buffers& buffers) const {
    const Share share = share_of(p_.G * plan.chunks * plan.tiles, worker, threads_);
    for (int64_t unit = share.begin; unit < share.end;) {
      const int64_t tile = unit % plan.tiles, chunk = unit / plan.tiles % plan.chunks;
      const int64_t group = unit / plan.tiles / plan.chunks;
      const int64_t tiles = std::min({plan.max_tiles, plan.tiles - tile, share.end - unit});
      Block block;
      block.group = group;
      block.n0 = chunk * plan.filters;
      block.n1 = std::min(block.n0 + plan.filters, pass.columns);
      block.m0 = tile * plan.tile;
      block.m1 = std::min(block.m0 + tiles * plan.tile, pass.gather.pixels());
      nhwc_ ? run_rows(pass, plan, block, buffers) : run_columns(pass, plan, block, buffers);
      unit += tiles;
    }
  }

  struct Block {
    int64_t group, n0, n1, m0, m1;  // filters [n0, n1) of the group, pixels [m0, m1)
  };

  void run_rows(const Pass& pass, const Plan& plan, const Block& b, const Buffers& buffers) const {
    Gather g = pass.gather;
    g.first_channel = b.group * g.channels;
    const int64_t depth = g.depth(), pixels = b.m1 - b.m0, width = ops_.tile_n;
    const int64_t sums_ld = padded_row<Acc>(plan.filters);
    const Acc* panels = plan.packed + b.group * plan.packed_group;
    for (int64_t k0 = 0; k0 < depth; k0 += plan.depth_block) {
      const int64_t k1 = std::min(k0 + plan.depth_block, depth);
      const Acc* A = buffers.gathered;
      int64_t lda = padded_row<Acc>(plan.depth_block);
      if (plan.gather_in_place) {
        lda = g.C;
        A = reinterpret_cast<const Acc*>(source_) + b.m0 * lda + g.first_channel + k0;
      } else {
        ops_.im2row(g, source_, b.m0, b.m1, k0, k1, buffers.gathered, lda);
      }
      for (int64_t n = b.n0; n < b.n1; n += width) {
        ops_.gemm(pixels, std::min(width, b.n1 - n), k1 - k0, A, lda,
                  panels + n * depth + k0 * width, width, buffers.sums + n - b.n0, sums_ld, k0 > 0);
      }
    }
    if (depth == 0) std::fill_n(buffers.sums, pixels * sums_ld, Acc(0));
    const int64_t channel = b.group * pass.columns + b.n0;
    RowEpilogue<T> epilogue = epilogue_of(channel, true);
    for (int64_t m = b.m0; m < b.m1; ++m) {
      const int64_t at = output_pixel(pass.out, m) * pass.out.C + channel;
      epilogue.residual = residual_at(at);
      ops_.store(epilogue, buffers.sums + (m - b.m0) * sums_ld, b.n1 - b.n0, out() + at, 1);
    }
  }

  void run_columns(const Pass& pass, const Plan& plan, const Block& b,
                   const Buffers& buffers) const {
    Gather g = pass.gather;
    g.first_channel = b.group * g.channels;
    g.channel_major = plan.channel_major;
    const int64_t depth = g.depth(), filters = b.n1 - b.n0;
    const int64_t pixels_ld = padded_row<Acc>(plan.max_tiles * plan.tile);
    const Acc* rows = plan.packed + b.group * plan.packed_group;
    int64_t ld = plan.packed_ld;
    if (plan.filter_in_place) {
      rows = reinterpret_cast<const Acc*>(filter_) + b.group * pass.group_stride;
      ld = depth;
    }
    for (int64_t k0 = 0; k0 < depth; k0 += plan.depth_block) {
      const int64_t k1 = std::min(k0 + plan.depth_block, depth);
      ops_.im2col(g, source_, b.m0, b.m1, k0, k1, buffers.gathered, pixels_ld);
      const Acc* A = rows + b.n0 * ld + k0;
      int64_t lda = ld;
      if (is_aliased(ld)) {
        lda = padded_row<Acc>(plan.depth_block);
        for (int64_t n = 0; n < filters; ++n) {
          std::copy_n(A + n * ld, k1 - k0, buffers.filters + n * lda);
        }
        A = buffers.filters;
      }
      ops_.gemm(filters, b.m1 - b.m0, k1 - k0, A, lda, buffers.gathered, pixels_ld, buffers.sums,
                pixels_ld, k0 > 0);
    }
    if (depth == 0) std::fill_n(buffers.sums, filters * pixels_ld, Acc(0));
    for (int64_t n = 0; n < filters; ++n) {
      store_channel(pass.out, b.group * pass.columns + b.n0 + n, b.m0, b.m1,
                    buffers.sums + n * pixels_ld);
    }
  }

  // Pixels [m0, m1) of one channel of an NCHW output, run by run.
  void store_channel(const OutputGrid& grid, int64_t channel, int64_t m0, int64_t m1,
                     const Acc* sums) const {
    RowEpilogue<T> epilogue = epilogue_of(channel, false);
    // A grid without gaps is one run an image, any other one run a row.
    const int64_t run = grid.is_whole() ? grid.H * grid.W : grid.count_w;
    const int64_t runs = grid.is_whole() ? 1 : grid.count_h;  // an image
    for (int64_t m = m0; m < m1;) {
      const int64_t j = m % run, i = m / run % runs, n = m / run / runs;
      const int64_t length = std::min(run - j, m1 - m);
      const int64_t pixel = (grid.first_h + i * grid.step_h) * grid.W + grid.first_w +
                            j * (grid.is_whole() ? 1 : grid.step_w);
      const int64_t at = (n * grid.C + channel) * grid.H * grid.W + pixel;
      epilogue.residual = residual_at(at);
      ops_.store(epilogue, sums + (m - m0), length, out() + at, grid.is_whole() ? 1 : grid.step_w);
      m += length;
    }
  }

  static int64_t output_pixel(const OutputGrid& grid, int64_t m) {
    if (grid.is_whole()) return m;
    const int64_t j = m % grid.count_w, i = m / grid.count_w % grid.count_h;
    const int64_t n = m / grid.count_w / grid.count_h;
    return (n * grid.H + grid.first_h + i * grid.step_h) * grid.W + grid.first_w + j * grid.step_w;
  }

  RowEpilogue<T> epilogue_of(int64_t channel, bool per_column) const {
    RowEpilogue<T> e;
    if (direction_ != Direction::kFprop) return e;
    if (p_.epilogue.scale) e.scale = static_cast<const Acc*>(args_.scale) + channel;
    if (p_.epilogue.shift) e.shift = static_cast<const Acc*>(args_.shift) + channel;
    e.per_column = per_column;
    e.activation = p_.epilogue.activation;
    e.slope = static_cast<Acc>(p_.epilogue.slope);
    return e;
  }
  const T* residual_at(int64_t at) const {
    const bool wanted = direction_ == Direction::kFprop && p_.epilogue.residual;
    return wanted ? static_cast<const T*>(args_.residual) + at : nullptr;
  }
  T* out() const { return static_cast<T*>(args_.out); }

  const Conv2dProblem p_;
  const Direction direction_;
  const Conv2dOps<T>& ops_;
  const int64_t threads_;
  const bool nhwc_;
  const std::vector<Pass> passes_;
  std::vector<Plan> plans_;
  Buffers buffers_{};
  int64_t worker_stride_ = 0;
  Conv2dArgs args_;
  const T* source_ = nullptr;
  const T* filter_ = nullptr;
};

}  // namespace

size_t conv2d_igemm_workspace(const Conv2dProblem& p, Direction direction, CpuIsa isa,
                              const Device& device) {
  return dispatch_dtype(p.dtype, [&](auto zero) {
    return Igemm<decltype(zero)>(p, direction, isa, device.threads).workspace_bytes();
  });
}

void conv2d_igemm(const Conv2dProblem& p, Direction direction, CpuIsa isa, const Conv2dArgs& args,
                  const Context& context) {
  dispatch_dtype(p.dtype, [&](auto zero) {
    Igemm<decltype(zero)>(p, direction, isa, context.threads).run(args, context);
  });
}

}  // namespace fastconv
