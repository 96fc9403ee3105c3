// The filter's gradient as an implicit GEMM whose reduction runs over pixels, and the bias's.
//
// NHWC: D[filter][tap, channel] = grad^T * patches: blocks of grad are transposed, patches are
// gathered with im2row and already lie along their columns.
// NCHW: D[channel, tap][filter] = patches * grad^T: patches are gathered with im2col.
// Either way the transposed operand is the small one: it serves all R * S * C columns.
//
// The pixels are split into parts whose number depends on the problem alone, each part has a D of
// its own, and the parts are added in order: any number of threads gives the same bits.
#include <algorithm>

#include "cpu/conv2d_passes.h"
#include "cpu/conv2d_rows.h"
#include "cpu/conv2d_scratch.h"

namespace fastconv {
namespace {

constexpr int64_t kPixelBlock = 256;  // the depth of one gemm: see kDepthBlock of conv2d_igemm.cpp
constexpr int64_t kFilterBlock = 128;
constexpr int64_t kPatchBlock = 512;
// Enough units for 32 threads, as long as a part has 512 pixels: writing, reading and adding a part
// then costs a few percent of computing it.
constexpr int64_t kWantedUnits = 32;
constexpr int64_t kPixelsPerPart = 512;
constexpr int64_t kReduceRows = 16;  // rows of D a unit of the final addition

template <class T>
class Wgrad {
 public:
  using Acc = accumulator_t<T>;

  Wgrad(const Conv2dProblem& problem, CpuIsa isa, int threads)
      : p_(without_rows(problem)),
        ops_(conv2d_ops<T>(isa)),
        threads_(threads),
        nhwc_(p_.layout == Layout::kNHWC),
        merge_(nhwc_ ? groups_to_merge(p_.C / p_.G) : 1),
        groups_(p_.G / merge_),
        gather_(merged(fprop_pass(p_).gather, merge_)),
        filters_(p_.K / groups_),
        depth_(gather_.depth()),
        pixels_(gather_.pixels()) {
    gather_.channel_major = !nhwc_ && p_.filter_layout == Layout::kNCHW;
    filter_chunks_ = divide_up(filters_, kFilterBlock);
    patch_chunks_ = divide_up(depth_, kPatchBlock);
    const int64_t tiles = groups_ * filter_chunks_ * patch_chunks_;
    parts_ = std::max<int64_t>(1, std::min(divide_up(kWantedUnits, std::max<int64_t>(1, tiles)),
                                           pixels_ / kPixelsPerPart));
    rows_ = nhwc_ ? filters_ : depth_;
    ld_ = padded_row<Acc>(nhwc_ ? depth_ : filters_);
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
      const int64_t units = groups_ * filter_chunks_ * patch_chunks_ * parts_;
      const Share share = share_of(units, worker, threads_);
      const int64_t offset = worker * worker_stride_;
      for (int64_t unit = share.begin; unit < share.end; ++unit) {
        run_unit(unit, patches_ + offset, grads_ + offset);
      }
    });
    auto* out = static_cast<T*>(args.out);
    const int64_t blocks = divide_up(rows_, kReduceRows);
    context.parallel_for(groups_ * blocks, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first = unit % blocks * kReduceRows;
        finish_rows(unit / blocks, first, std::min(first + kReduceRows, rows_), out);
      }
    });
  }

 private:
  // Groups with fewer channels than a vector has lanes are computed together in NHWC, and only the
  // blocks on the diagonal are kept: it is gathering short runs that would cost, not multiplying.
  int64_t groups_to_merge(int64_t channels) const {
    int64_t merge = 1;
    for (int64_t m = 2; m <= p_.G && m * channels <= ops_.lanes; ++m) {
      if (p_.G % m == 0) merge = m;
    }
    return merge;
  }
  static Gather merged(Gather g, int64_t merge) {
    g.channels *= merge;
    return g;
  }

  void carve(Scratch& scratch) {
    sums_ = scratch.template take<Acc>(parts_ * groups_ * rows_ * ld_);
    const int64_t patch = std::min(depth_, kPatchBlock), filters = std::min(filters_, kFilterBlock);
    const auto matrix = [](int64_t rows, int64_t columns) {
      return rows * padded_row<Acc>(columns);
    };
    const int64_t patch_size = nhwc_ ? matrix(kPixelBlock, patch) : matrix(patch, kPixelBlock);
    const int64_t grad_size = nhwc_ ? matrix(filters, kPixelBlock) : matrix(kPixelBlock, filters);
    for (int64_t worker = 0; worker < threads_; ++worker) {
      Acc* patches = scratch.template take<Acc>(patch_size);
      Acc* grads = scratch.template take<Acc>(grad_size);
      if (worker == 0) {
        patches_ = patches;
        grads_ = grads;
      }
      if (worker == 1) worker_stride_ = patches - patches_;
    }
  }

  Acc* sums_at(int64_t part, int64_t group, int64_t row) const {
    return sums_ + ((part * groups_ + group) * rows_ + row) * ld_;
  }

  // One tile of D, summed over one part of the pixels.
  void run_unit(int64_t unit, Acc* patches, Acc* grads) const {
    const int64_t part = unit % parts_, tile = unit / parts_;
    const int64_t patch_chunk = tile % patch_chunks_;
    const int64_t filter_chunk = tile / patch_chunks_ % filter_chunks_;
    const int64_t group = tile / patch_chunks_ / filter_chunks_;
    const int64_t f0 = filter_chunk * kFilterBlock, f1 = std::min(f0 + kFilterBlock, filters_);
    const int64_t d0 = patch_chunk * kPatchBlock, d1 = std::min(d0 + kPatchBlock, depth_);
    Gather g = gather_;
    g.first_channel = group * g.channels;
    const int64_t row_ld = padded_row<Acc>(kPixelBlock);
    Acc* D = nhwc_ ? sums_at(part, group, f0) + d0 : sums_at(part, group, d0) + f0;

    const int64_t no_offset = 0;
    const Share share = share_of(pixels_, part, parts_);
    for (int64_t m0 = share.begin; m0 < share.end; m0 += kPixelBlock) {
      const int64_t m1 = std::min(m0 + kPixelBlock, share.end);
      const bool more = m0 > share.begin;
      const int64_t channel = group * filters_ + f0;
      if (nhwc_) {
        const int64_t ld = padded_row<Acc>(d1 - d0);
        ops_.im2row(g, input_, m0, m1, d0, d1, patches, ld);
        ops_.permute({{f1 - f0, m1 - m0, 1, 1}, {1, p_.K, 0, 0}, {row_ld, 1, 0, 0}},
                     grad_ + m0 * p_.K + channel, grads);
        ops_.gemm({1, m1 - m0, &no_offset, row_ld, ld, ld_, more}, f1 - f0, d1 - d0, grads, patches,
                  D);
      } else {
        const int64_t ld = padded_row<Acc>(f1 - f0);
        ops_.im2col(g, input_, m0, m1, d0, d1, patches, row_ld);
        transpose_images(channel, f1 - f0, m0, m1, grads, ld);
        ops_.gemm({1, m1 - m0, &no_offset, row_ld, ld, ld_, more}, d1 - d0, f1 - f0, patches, grads,
                  D);
      }
    }
    if (share.begin == share.end) {  // an empty batch
      const int64_t rows = nhwc_ ? f1 - f0 : d1 - d0, columns = nhwc_ ? d1 - d0 : f1 - f0;
      for (int64_t row = 0; row < rows; ++row) std::fill_n(D + row * ld_, columns, Acc(0));
    }
  }

  // Rows of pixels [m0, m1) of an NCHW gradient, `filters` channels from `channel` on.
  void transpose_images(int64_t channel, int64_t filters, int64_t m0, int64_t m1, Acc* dst,
                        int64_t ld) const {
    const int64_t image = gather_.h.count * gather_.w.count;
    for (int64_t m = m0; m < m1;) {
      const int64_t n = m / image, first = m % image;
      const int64_t length = std::min(image - first, m1 - m);
      ops_.permute({{filters, length, 1, 1}, {image, 1, 0, 0}, {1, ld, 0, 0}},
                   grad_ + (n * p_.K + channel) * image + first, dst + (m - m0) * ld);
      m += length;
    }
  }

  // Adds the parts of rows [r0, r1) of D and writes them in the filter's layout and type.
  void finish_rows(int64_t group, int64_t r0, int64_t r1, T* out) const {
    const int64_t columns = nhwc_ ? depth_ : filters_;
    Acc* total = sums_at(0, group, r0);
    for (int64_t part = 1; part < parts_; ++part) {
      const Acc* more = sums_at(part, group, r0);
      for (int64_t row = 0; row < r1 - r0; ++row) {
        for (int64_t i = 0; i < columns; ++i) total[row * ld_ + i] += more[row * ld_ + i];
      }
    }
    const Strides4 f = filter_strides(p_);
    out += group * filters_ * f.n;
    if (!nhwc_) {  // rows of D are numbered as a filter's elements are
      ops_.permute_back({{r1 - r0, filters_, 1, 1}, {ld_, 1, 0, 0}, {1, f.n, 0, 0}}, total,
                        out + r0);
      return;
    }
    const int64_t taps = p_.R * p_.S, channels = gather_.channels / merge_;
    const int64_t tap_stride = p_.filter_layout == Layout::kNCHW ? 1 : channels;
    for (int64_t row = r0; row < r1;) {  // rows of one of the merged groups at a time
      const int64_t filters = filters_ / merge_, part = row / filters;
      const int64_t next = std::min(r1, (part + 1) * filters);
      ops_.permute_back({{next - row, taps, channels, 1},
                         {ld_, gather_.channels, 1, 0},
                         {f.n, tap_stride, f.c, 0}},
                        total + (row - r0) * ld_ + part * channels, out + row * f.n);
      row = next;
    }
  }

  const Conv2dProblem p_;
  const Conv2dOps<T>& ops_;
  const int64_t threads_;
  const bool nhwc_;
  const int64_t merge_, groups_;
  Gather gather_;
  const int64_t filters_, depth_, pixels_;  // of one group
  int64_t filter_chunks_, patch_chunks_, parts_;
  int64_t rows_, ld_;  // of one group's D
  Acc* sums_ = nullptr;
  Acc* patches_ = nullptr;
  Acc* grads_ = nullptr;
  int64_t worker_stride_ = 0;
  const T* input_ = nullptr;
  const T* grad_ = nullptr;
};

// bgrad sums parts of the pixels (NHWC) or images (NCHW) in float64, then the parts in order.
struct BgradParts {
  int64_t items, parts;
  explicit BgradParts(const Conv2dProblem& p)
      : items(p.layout == Layout::kNHWC ? p.N * p.P() * p.Q() : p.N),
        parts(std::max<int64_t>(
            1, std::min<int64_t>(64, p.layout == Layout::kNHWC ? items / 64 : items))) {}
};

template <class T>
void bgrad(const Conv2dProblem& p, CpuIsa isa, const Conv2dArgs& args, const Context& context) {
  const Conv2dOps<T>& ops = conv2d_ops<T>(isa);
  const BgradParts split(p);
  const auto* grad = static_cast<const T*>(args.grad);
  auto* sums = static_cast<double*>(args.workspace);
  const int64_t image = p.P() * p.Q();
  if (p.layout == Layout::kNHWC) {
    context.parallel_for(split.parts, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const Share share = share_of(split.items, part, split.parts);
        std::fill_n(sums + part * p.K, p.K, 0.0);
        ops.add_rows(grad + share.begin * p.K, share.end - share.begin, p.K, p.K,
                     sums + part * p.K);
      }
    });
  } else {
    context.parallel_for(split.parts * p.K, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const Share share = share_of(split.items, unit / p.K, split.parts);
        double sum = 0;
        for (int64_t n = share.begin; n < share.end; ++n) {
          sum += ops.sum(grad + (n * p.K + unit % p.K) * image, image);
        }
        sums[unit] = sum;
      }
    });
  }
  auto* out = static_cast<T*>(args.out);
  for (int64_t k = 0; k < p.K; ++k) {
    double sum = 0;
    for (int64_t part = 0; part < split.parts; ++part) sum += sums[part * p.K + k];
    out[k] = T(static_cast<accumulator_t<T>>(sum));
  }
}

}  // namespace

size_t conv2d_wgrad_workspace(const Conv2dProblem& p, CpuIsa isa, const Device& device) {
  return dispatch_dtype(p.dtype, [&](auto zero) {
    return Wgrad<decltype(zero)>(p, isa, device.threads).workspace_bytes();
  });
}

void conv2d_wgrad(const Conv2dProblem& p, CpuIsa isa, const Conv2dArgs& args,
                  const Context& context) {
  dispatch_dtype(p.dtype, [&](auto zero) {
    Wgrad<decltype(zero)>(p, isa, context.threads).run(args, context);
  });
}

size_t conv2d_bgrad_workspace(const Conv2dProblem& p) {
  return static_cast<size_t>(BgradParts(p).parts * p.K) * sizeof(double);
}

void conv2d_bgrad(const Conv2dProblem& p, CpuIsa isa, const Conv2dArgs& args,
                  const Context& context) {
  dispatch_dtype(p.dtype, [&](auto zero) { bgrad<decltype(zero)>(p, isa, args, context); });
}

}  // namespace fastconv
