// The filter's gradient of grouped convolution on NHWC tensors: see conv2d_grouped.h. Lanes are
// filters here too, and a tile keeps three taps' few channels in registers while pixels pass.
//
// The output rows are split into parts whose number depends on the problem alone, each part has
// sums of its own, and the parts are added in order: any number of threads gives the same bits.
#include "cpu/conv2d_grouped.h"

namespace fastconv {
namespace {

constexpr int64_t kWindowBytes = 128 << 10;  // beside the gradients in a second-level cache
// Pixels a tile adds up in registers: adding its sums to the part's costs a hundredth of making
// them, and the error stays that of short sums.
constexpr int64_t kTilePixels = 128;
// Enough units for 32 threads, as long as a part has 512 pixels: see conv2d_wgrad.cpp.
constexpr int64_t kWantedUnits = 32;
constexpr int64_t kPixelsPerPart = 512;

template <class T>
class GroupedWgrad {
 public:
  using Acc = accumulator_t<T>;

  GroupedWgrad(const Conv2dProblem& problem, CpuIsa isa, int threads)
      : p_(problem),
        ops_(grouped_ops<T>(isa)),
        permute_back_(conv2d_ops<T>(isa).permute_back),
        threads_(threads),
        lanes_(p_, Direction::kWgrad, ops_.lanes),
        gather_(fprop_pass(p_).gather),
        window_(gather_, lanes_.window),
        lines_(p_.N * gather_.h.count),
        slab_(gather_.taps() * lanes_.channels * ops_.lanes) {
    const int64_t most = std::min(lines_, gather_.pixels() / kPixelsPerPart);
    parts_ = std::clamp<int64_t>(most, 1, divide_up(kWantedUnits, lanes_.bundles));
    block_rows_ = window_.rows_within(kWindowBytes);
    columns_ = divide_up(gather_.w.count, divide_up(gather_.w.count, kTilePixels));
    tile_rows_ = std::clamp<int64_t>(kTilePixels / gather_.w.count, 1, block_rows_);
  }

  size_t workspace_bytes() {
    Scratch scratch;
    carve(scratch);
    return scratch.used();
  }

  void run(const Conv2dArgs& args, const Context& context) {
    Scratch scratch(args.workspace);
    carve(scratch);
    input_ = static_cast<const T*>(args.input);
    grad_ = static_cast<const T*>(args.grad);
    for_each_worker(context, [&](int64_t worker) {
      const Share share = share_of(parts_ * lanes_.bundles, worker, threads_);
      const int64_t offset = worker * worker_stride_;
      for (int64_t unit = share.begin; unit < share.end; ++unit) {
        run_unit(unit / lanes_.bundles, unit % lanes_.bundles, windows_ + offset, grads_ + offset);
      }
    });
    context.parallel_for(lanes_.bundles * lanes_.slabs, [&](int64_t begin, int64_t end) {
      for (int64_t slab = begin; slab < end; ++slab) finish(slab, static_cast<T*>(args.out));
    });
  }

 private:
  void carve(Scratch& scratch) {
    sums_ = scratch.template take<Acc>(parts_ * lanes_.bundles * lanes_.slabs * slab_);
    for (int64_t worker = 0; worker < threads_; ++worker) {
      Acc* window = scratch.template take<Acc>(window_.size(block_rows_));
      Acc* grads = scratch.template take<Acc>(tile_rows_ * gather_.w.count * ops_.lanes);
      if (worker == 0) {
        windows_ = window;
        grads_ = grads;
      }
      if (worker == 1) worker_stride_ = grads - grads_;
    }
  }

  Acc* sums_at(int64_t part, int64_t slab) const {
    return sums_ + (part * lanes_.bundles * lanes_.slabs + slab) * slab_;
  }

  // One bundle's sums over one part of the output rows, a window at a time.
  void run_unit(int64_t part, int64_t bundle, Acc* window, Acc* grads) const {
    const int64_t first = bundle * lanes_.slabs, image_rows = gather_.h.count;
    std::fill_n(sums_at(part, first), lanes_.slabs * slab_, Acc(0));
    const Share share = share_of(lines_, part, parts_);
    for (int64_t line = share.begin; line < share.end;) {
      const int64_t image = line / image_rows, row = line % image_rows;
      const int64_t count = std::min({block_rows_, image_rows - row, share.end - line});
      window_.copy(ops_.copy, input_, image, {row, row + count}, bundle * lanes_.window,
                   lanes_.window, window);
      for (int64_t i = 0; i < count; i += tile_rows_) {
        const int64_t rows = std::min(tile_rows_, count - i);
        const Acc* under = window + i * gather_.h.step * window_.row_ld();
        for (int64_t slab = first; slab < first + lanes_.slabs; ++slab) {
          run_rows(line + i, rows, slab, under, grads, sums_at(part, slab));
        }
      }
      line += count;
    }
  }

  void run_rows(int64_t line, int64_t rows, int64_t slab, const Acc* window, Acc* grads,
                Acc* sums) const {
    const int64_t L = ops_.lanes, Q = gather_.w.count, tap = lanes_.channels * L;
    const GatherAxis& w = gather_.w;
    ops_.copy(grad_ + line * Q * p_.K + slab * L, p_.K, rows * Q, L, grads, L);
    GroupedWgradTile tile = {rows,
                             0,
                             gather_.h.step * window_.row_ld(),
                             Q * L,
                             lanes_.channels,
                             lanes_.window,
                             w.step,
                             w.hop,
                             lanes_.columns};
    const GroupedTaps three = w.step == 1 && w.hop == 1 ? kThreeTaps : kThreeApart;
    for (int64_t j = 0; j < Q; j += columns_) {
      tile.columns = std::min(columns_, Q - j);
      for (int64_t r = 0; r < p_.R; ++r) {
        for (int64_t s = 0; s < p_.S;) {
          const GroupedTaps kind = p_.S - s >= 3 ? three : kOneTap;
          ops_.wgrad[kind][lanes_.permuted](
              tile, window + window_.offset(r, s) + j * w.step * lanes_.window, grads + j * L,
              sums + (r * p_.S + s) * tap);
          s += taps_of(kind);
        }
      }
    }
  }

  // Adds a slab's parts and writes them in the filter's layout and type.
  void finish(int64_t slab, T* out) const {
    Acc* total = sums_at(0, slab);
    for (int64_t part = 1; part < parts_; ++part) {
      const Acc* more = sums_at(part, slab);
      for (int64_t i = 0; i < slab_; ++i) total[i] += more[i];
    }
    const Strides4 f = filter_strides(p_);
    const int64_t L = ops_.lanes;
    permute_back_({{L, gather_.taps(), lanes_.channels, 1},
                   {1, lanes_.channels * L, L, 0},
                   {f.n, f.w, f.c, 0}},
                  total, out + slab * L * f.n);
  }

  const Conv2dProblem p_;
  const GroupedOps<T>& ops_;
  void (*const permute_back_)(const Permutation&, const Acc*, T*);
  const int64_t threads_;
  const GroupedLanes lanes_;
  const Gather gather_;
  const ChannelWindow<T> window_;
  const int64_t lines_, slab_;  // output rows of all images; a slab's elements
  int64_t parts_, block_rows_, tile_rows_, columns_;
  Acc* sums_ = nullptr;
  Acc* windows_ = nullptr;
  Acc* grads_ = nullptr;
  int64_t worker_stride_ = 0;
  const T* input_ = nullptr;
  const T* grad_ = nullptr;
};

}  // namespace

size_t conv2d_grouped_wgrad_workspace(const Conv2dProblem& p, CpuIsa isa, int threads) {
  return dispatch_dtype(p.dtype, [&](auto zero) {
    return GroupedWgrad<decltype(zero)>(p, isa, threads).workspace_bytes();
  });
}

void conv2d_grouped_wgrad(const Conv2dProblem& p, CpuIsa isa, const Conv2dArgs& args,
                          const Context& context) {
  dispatch_dtype(p.dtype, [&](auto zero) {
    GroupedWgrad<decltype(zero)>(p, isa, context.threads).run(args, context);
  });
}

}  // namespace fastconv
