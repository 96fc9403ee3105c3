// Winograd's convolution: blocks of tiles go through the three transforms, with (m + 2)^2 matrix
// products [tiles x C] * [C x K] between them, and a result is written once, epilogue applied.
//
// A unit of work is (block of filters, block of tiles). Its transformed inputs stay in a second- or
// third-level cache while its filters pass by. The reduction over channels is cut by the problem
// alone, so any number of threads gives the same bits.
#include "cpu/conv2d_winograd.h"

#include <cmath>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/conv2d_igemm.h"

#define FASTCONV_KERNEL_FILE "cpu/conv2d_winograd.inl"
#include "cpu/for_each_isa.h"

namespace fastconv {
namespace {

template <int kTile>
const WinogradOps& ops_of([[maybe_unused]] CpuIsa isa) {
#if defined(__x86_64__)
  if (isa == CpuIsa::kAvx512) return avx512::winograd::ops<kTile>();
  if (isa == CpuIsa::kAvx2) return avx2::winograd::ops<kTile>();
#endif
  return portable::winograd::ops<kTile>();
}

constexpr int64_t kPackChannels = 64;   // of a filter permuted at once, whose rows it reads in runs
constexpr int64_t kMaxWidth = 32;       // the widest register tile
constexpr int64_t kChunkFilters = 128;  // multiplied before their products are transformed
// Tiles a block has at least: each element of the filter that comes from a third-level cache is
// used that often, twice as often where it is large. More, where a block's transformed inputs and
// products fit these bytes.
constexpr int64_t kLeastTiles = 28;
constexpr size_t kLargeFilter = 4 << 20;
constexpr int64_t kBlockBytes = 768 << 10;
constexpr int64_t kFewestTiles = 8;  // where threads would have nothing to do otherwise

class Winograd {
 public:
  Winograd(const Conv2dProblem& problem, int64_t tile, CpuIsa isa, int threads)
      : call_(problem, Direction::kFprop, isa, threads),
        transforms_(winograd_ops(tile, isa)),
        tile_(tile),
        matrices_((tile + 2) * (tile + 2)),
        width_(call_.ops.tile_n),
        panels_(divide_up(problem.K, width_)),
        rows_(divide_up(problem.P(), tile)),
        columns_(divide_up(problem.Q(), tile)) {
    const Conv2dProblem& p = call_.p;
    packed_ld_ = padded_row<float>(panels_ * p.C * width_);
    channels_ld_ = padded_row<float>(p.C);
    plan();
  }

  size_t packed_bytes() const {
    return static_cast<size_t>(matrices_ * packed_ld_) * sizeof(float);
  }
  size_t workspace_bytes() {
    Scratch scratch;
    carve(scratch);
    return scratch.used();
  }

  // [matrix][panel][channel][filter of the panel]. A unit of work is a panel's block of channels.
  void pack(const float* filter, float* packed, const Context& context) const {
    const int64_t blocks = divide_up(call_.p.C, kPackChannels);
    context.parallel_for(panels_ * blocks, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        pack_block(filter, unit / blocks, unit % blocks * kPackChannels, packed);
      }
    });
  }

  void run(const Conv2dArgs& args, const Context& context) {
    call_.bind(args);
    Scratch scratch(args.workspace);
    carve(scratch);
    std::fill_n(zeros_, call_.p.C, 0.0f);
    if (!call_.p.filter_kept) {
      pack(call_.filter, packed_, context);
      filters_ = packed_;
    } else {
      filters_ = static_cast<const float*>(args.packed);
    }
    for_each_worker(context, [&](int64_t worker) {
      const int64_t offset = worker * worker_stride_;
      const Share share = share_of(filter_blocks_ * tile_blocks_, worker, call_.threads);
      for (int64_t unit = share.begin; unit < share.end; ++unit) {
        const Share k = share_of(panels_, unit / tile_blocks_, filter_blocks_);
        const Share t = share_of(tiles(), unit % tile_blocks_, tile_blocks_);
        run_unit({t.begin, t.end, k.begin, k.end}, inputs_ + offset, products_ + offset,
                 outputs_ + offset);
      }
    });
  }

 private:
  struct Unit {
    int64_t t0, t1;          // tiles
    int64_t panel0, panel1;  // of filters
  };

  int64_t tiles() const { return call_.p.N * rows_ * columns_; }

  // Blocks of tiles as large as the caches allow, since every block reads the whole transformed
  // filter; and units for every thread, of tiles or, where those are few, of filters.
  void plan() {
    chunk_panels_ = std::min(panels_, divide_up(kChunkFilters, width_));
    products_row_ = padded_row<float>(chunk_panels_ * width_);
    const int64_t tile_bytes =
        matrices_ * (channels_ld_ + products_row_) * static_cast<int64_t>(sizeof(float));
    const int64_t fit = kBlockBytes / tile_bytes;
    const int64_t least = packed_bytes() > kLargeFilter ? 2 * kLeastTiles : kLeastTiles;
    const int64_t most = std::max(least, fit - fit % call_.ops.tile_m);
    tile_blocks_ = std::max<int64_t>(1, divide_up(tiles(), most));
    if (tile_blocks_ < 4 * call_.threads && tile_blocks_ % call_.threads != 0) {
      const int64_t even = round_up(tile_blocks_, call_.threads);
      if (tiles() / even >= kLeastTiles) {
        tile_blocks_ = even;
      } else {
        filter_blocks_ = std::clamp<int64_t>(panels_ * width_ / kMinFilters, 1, call_.threads);
        const int64_t wanted = divide_up(call_.threads, filter_blocks_);
        const int64_t smallest = divide_up(tiles(), kFewestTiles);
        tile_blocks_ = std::max({tile_blocks_, int64_t{1}, std::min(wanted, smallest)});
      }
    }
    const int64_t block = divide_up(tiles(), tile_blocks_);
    inputs_ld_ = padded_row<float>(block * channels_ld_);
    products_ld_ = padded_row<float>(block * products_row_);
  }

  void carve(Scratch& scratch) {
    for (int64_t worker = 0; worker < call_.threads; ++worker) {
      float* first = scratch.take<float>(matrices_ * inputs_ld_);
      float* second = scratch.take<float>(matrices_ * products_ld_);
      float* third = scratch.take<float>(tile_ * tile_ * products_row_);
      if (worker == 0) {
        inputs_ = first;
        products_ = second;
        outputs_ = third;
      }
      if (worker == 1) worker_stride_ = first - inputs_;
    }
    zeros_ = scratch.take<float>(call_.p.C);
    if (!call_.p.filter_kept) packed_ = scratch.take<float>(matrices_ * packed_ld_);
  }

  void pack_block(const float* filter, int64_t panel, int64_t channel, float* packed) const {
    const Conv2dProblem& p = call_.p;
    const Strides4 f = filter_strides(p);
    const int64_t channels = std::min(kPackChannels, p.C - channel);
    const int64_t filters = std::min(width_, p.K - panel * width_);
    alignas(64) float taps[kPackChannels * 9 * kMaxWidth];
    if (filters < width_) std::fill_n(taps, channels * 9 * width_, 0.0f);
    call_.ops.permute(
        {{filters, 3, 3, channels}, {f.n, f.h, f.w, f.c}, {1, 3 * width_, width_, 9 * width_}},
        filter + panel * width_ * f.n + channel * f.c, taps);
    transforms_.filter(taps, channels, width_, packed + (panel * p.C + channel) * width_,
                       packed_ld_);
  }

  void run_unit(const Unit& unit, float* inputs, float* products, float* outputs) const {
    for (int64_t t = unit.t0; t < unit.t1; ++t) {
      transforms_.input(patch_of(t), inputs + (t - unit.t0) * channels_ld_, inputs_ld_);
    }
    for (int64_t panel = unit.panel0; panel < unit.panel1; panel += chunk_panels_) {
      const int64_t end = std::min(panel + chunk_panels_, unit.panel1);
      multiply(unit.t1 - unit.t0, panel, end, inputs, products);
      for (int64_t t = unit.t0; t < unit.t1; ++t) {
        finish_tile(t, panel * width_, std::min(end * width_, call_.p.K),
                    products + (t - unit.t0) * products_row_, outputs);
      }
    }
  }

  void multiply(int64_t tiles, int64_t panel0, int64_t panel1, const float* inputs,
                float* products) const {
    const Conv2dProblem& p = call_.p;
    const int64_t pieces = divide_up(p.C, kDepthBlock);
    const int64_t no_offset = 0;
    GemmShape shape = {1, 0, &no_offset, channels_ld_, width_, products_row_, false};
    for (int64_t x = 0; x < matrices_; ++x) {
      for (int64_t panel = panel0; panel < panel1; ++panel) {
        const float* filters = filters_ + x * packed_ld_ + panel * p.C * width_;
        float* to = products + x * products_ld_ + (panel - panel0) * width_;
        const int64_t columns = std::min(width_, p.K - panel * width_);
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const Share c = share_of(p.C, piece, pieces);
          shape.length = c.end - c.begin;
          shape.accumulate = piece > 0;
          call_.ops.gemm(shape, tiles, columns, inputs + x * inputs_ld_ + c.begin,
                         filters + c.begin * width_, to);
        }
      }
    }
  }

  struct Place {
    int64_t image, p, q;  // the first output pixel of a tile
  };
  Place place_of(int64_t t) const {
    return {t / columns_ / rows_, t / columns_ % rows_ * tile_, t % columns_ * tile_};
  }

  WinogradPatch patch_of(int64_t t) const {
    const Conv2dProblem& p = call_.p;
    const Place at = place_of(t);
    const int64_t h = at.p - p.pad_h, w = at.q - p.pad_w, size = tile_ + 2;
    WinogradPatch patch;
    patch.image = call_.source + at.image * p.H * p.W * p.C;
    patch.zeros = zeros_;
    patch.row = p.W * p.C;
    patch.pixel = p.C;
    patch.first = h * patch.row + w * patch.pixel;
    patch.channels = p.C;
    patch.top = std::max<int64_t>(0, -h);
    patch.bottom = std::min(size, p.H - h);
    patch.left = std::max<int64_t>(0, -w);
    patch.right = std::min(size, p.W - w);
    return patch;
  }

  // Filters [k0, k1) of one tile.
  void finish_tile(int64_t t, int64_t k0, int64_t k1, const float* products, float* outputs) const {
    const Conv2dProblem& p = call_.p;
    const Place at = place_of(t);
    const bool finite = transforms_.output(products, products_ld_, k1 - k0, outputs, products_row_);
    const int64_t rows = std::min(tile_, p.P() - at.p), columns = std::min(tile_, p.Q() - at.q);
    RowEpilogue<float> epilogue = call_.epilogue_of(k0, true);
    for (int64_t i = 0; i < rows; ++i) {
      float* sums = outputs + i * tile_ * products_row_;
      if (!finite) repair({at.image, at.p + i, at.q}, columns, k0, k1, sums);
      const int64_t pixel = (at.image * p.P() + at.p + i) * p.Q() + at.q;
      call_.store(epilogue, {columns, k1 - k0, products_row_, p.K, 1}, sums, pixel * p.K + k0);
    }
  }

  // An infinity or a NaN reaches every pixel of its tiles, whether or not that pixel's window holds
  // it, and large numbers may overflow on the way. So what is not finite is computed again.
  void repair(Place at, int64_t columns, int64_t k0, int64_t k1, float* sums) const {
    for (int64_t j = 0; j < columns; ++j, ++at.q, sums += products_row_) {
      for (int64_t k = k0; k < k1; ++k) {
        if (!std::isfinite(sums[k - k0])) sums[k - k0] = direct_sum(at, k);
      }
    }
  }
  float direct_sum(const Place& at, int64_t k) const {
    const Conv2dProblem& p = call_.p;
    const Strides4 f = filter_strides(p);
    double sum = 0;
    for (int64_t r = 0; r < 3; ++r) {
      for (int64_t s = 0; s < 3; ++s) {
        const int64_t h = at.p - p.pad_h + r, w = at.q - p.pad_w + s;
        if (h < 0 || h >= p.H || w < 0 || w >= p.W) continue;
        const float* pixel = call_.source + ((at.image * p.H + h) * p.W + w) * p.C;
        const float* tap = call_.filter + f.at(k, 0, r, s);
        for (int64_t c = 0; c < p.C; ++c) {
          sum += static_cast<double>(pixel[c]) * static_cast<double>(tap[c * f.c]);
          if (std::isnan(sum)) return static_cast<float>(sum);
        }
      }
    }
    return static_cast<float>(sum);
  }

  IgemmCall<float> call_;
  const WinogradOps& transforms_;
  const int64_t tile_, matrices_;
  const int64_t width_, panels_;  // filters a panel, panels
  const int64_t rows_, columns_;  // of tiles in an image
  int64_t filter_blocks_ = 1, tile_blocks_ = 1;
  int64_t chunk_panels_ = 1;  // panels multiplied before their products are transformed
  int64_t packed_ld_ = 0, inputs_ld_ = 0, products_ld_ = 0;  // between matrices
  int64_t channels_ld_ = 0, products_row_ = 0;               // between tiles
  float* inputs_ = nullptr;
  float* products_ = nullptr;
  float* outputs_ = nullptr;
  float* zeros_ = nullptr;
  float* packed_ = nullptr;
  const float* filters_ = nullptr;
  int64_t worker_stride_ = 0;
};

}  // namespace

const WinogradOps& winograd_ops(int64_t tile, CpuIsa isa) {
  return tile == 4 ? ops_of<4>(isa) : ops_of<2>(isa);
}

size_t conv2d_winograd_workspace(const Conv2dProblem& p, int64_t tile, CpuIsa isa, int threads) {
  return Winograd(p, tile, isa, threads).workspace_bytes();
}
size_t conv2d_winograd_packed_bytes(const Conv2dProblem& p, int64_t tile, CpuIsa isa) {
  return Winograd(p, tile, isa, 1).packed_bytes();
}
void conv2d_winograd_pack(const Conv2dProblem& p, int64_t tile, CpuIsa isa, const Conv2dArgs& args,
                          const Context& context) {
  Winograd(p, tile, isa, context.threads)
      .pack(static_cast<const float*>(args.filter), static_cast<float*>(args.out), context);
}
void conv2d_winograd(const Conv2dProblem& p, int64_t tile, CpuIsa isa, const Conv2dArgs& args,
                     const Context& context) {
  Winograd(p, tile, isa, context.threads).run(args, context);
}

}  // namespace fastconv
