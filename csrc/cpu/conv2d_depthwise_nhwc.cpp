// Depthwise convolution on NHWC tensors: fprop, dgrad and wgrad, a vector of channels at a time.
#include "cpu/conv2d_depthwise.h"

#include <algorithm>

#include "cpu/conv2d_igemm.h"

namespace fastconv {
namespace {

constexpr int64_t kMaxParts = 32;  // of wgrad: rows of gradients are split by the problem alone

template <class T>
class DepthwiseNhwc {
 public:
  using Acc = accumulator_t<T>;

  DepthwiseNhwc(const Conv2dProblem& problem, Direction direction, CpuIsa isa)
      : call_(problem, direction, isa, 1),
        channels_(problem.C),
        ld_(padded_row<Acc>(problem.C)),
        parts_(std::clamp<int64_t>(problem.N * problem.P() / 4, 1, kMaxParts)) {}

  size_t filter_bytes() const {
    int64_t taps = 0;
    for (const Pass& pass : call_.passes) taps += pass.gather.taps();
    return static_cast<size_t>(taps * ld_) * sizeof(Acc);
  }
  size_t parts_bytes() const {
    return static_cast<size_t>(parts_ * call_.p.R * call_.p.S * ld_) * sizeof(Acc);
  }

  void run(const Conv2dArgs& args, const Context& context) {
    call_.bind(args);
    auto* packed = static_cast<Acc*>(args.workspace);
    for (const Pass& pass : call_.passes) {
      pack(pass, packed);
      const int64_t rows = pass.gather.N * pass.gather.h.count;
      context.parallel_for(rows, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) run_row(pass, packed, row);
      });
      packed += pass.gather.taps() * ld_;
    }
  }

  void run_wgrad(const Conv2dArgs& args, const Context& context) const {
    const Gather& g = call_.passes[0].gather;
    const Conv2dProblem& p = call_.p;
    auto* sums = static_cast<Acc*>(args.workspace);
    const int64_t size = p.R * p.S * ld_, rows = p.N * g.h.count;
    context.parallel_for(parts_, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        Acc* sum = sums + part * size;
        std::fill_n(sum, size, Acc(0));
        const Share share = share_of(rows, part, parts_);
        for (int64_t row = share.begin; row < share.end; ++row) wgrad_row(args, row, sum);
      }
    });
    for (int64_t part = 1; part < parts_; ++part) {
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
    }
    const Strides4 f = filter_strides(p);
    call_.ops.permute_back({{channels_, p.R, p.S, 1}, {1, p.S * ld_, ld_, 0}, {f.n, f.h, f.w, 0}},
                           sums, static_cast<T*>(args.out));
  }

 private:
  // [tap][channel]: a pass's groups are its channels.
  void pack(const Pass& pass, Acc* packed) const {
    const int64_t* s = pass.filter_stride;
    const Gather& g = pass.gather;
    if (ld_ > channels_) {
      for (int64_t tap = 0; tap < g.taps(); ++tap) {
        std::fill_n(packed + tap * ld_ + channels_, ld_ - channels_, Acc(0));
      }
    }
    call_.ops.permute({{channels_, g.h.taps, g.w.taps, 1},
                       {pass.group_stride, s[1], s[2], 0},
                       {1, g.w.taps * ld_, ld_, 0}},
                      call_.filter + pass.filter_offset, packed);
  }

  void run_row(const Pass& pass, const Acc* packed, int64_t index) const {
    const Gather& g = pass.gather;
    const OutputGrid& out = pass.out;
    const int64_t n = index / g.h.count, i = index % g.h.count;
    const T* source[kMaxDepthwiseRows];
    const Acc* filter[kMaxDepthwiseRows];
    DepthwiseRow<T> row;
    row.channels = channels_;
    row.rows = 0;
    row.source = source;
    row.filter = filter;
    row.filter_ld = ld_;
    row.w = g.w;
    for (int64_t r = 0; r < g.h.taps; ++r) {
      const int64_t h = i * g.h.step + g.h.first + r * g.h.hop;
      if (h < 0 || h >= g.h.size) continue;
      source[row.rows] = call_.source + (n * g.h.size + h) * g.w.size * channels_;
      filter[row.rows] = packed + r * g.w.taps * ld_;
      ++row.rows;
    }
    const int64_t at =
        ((n * out.H + out.first_h + i * out.step_h) * out.W + out.first_w) * channels_;
    row.out = call_.out + at;
    row.out_step = out.step_w * channels_;
    RowEpilogue<T> epilogue = call_.epilogue_of(0, true);
    if (call_.fprop && call_.p.epilogue.residual) {
      epilogue.residual = static_cast<const T*>(call_.args.residual) + at;
    }
    call_.ops.depthwise(row, epilogue);
  }

  void wgrad_row(const Conv2dArgs& args, int64_t index, Acc* sum) const {
    const Gather& g = call_.passes[0].gather;
    const int64_t n = index / g.h.count, i = index % g.h.count;
    const auto* grad = static_cast<const T*>(args.grad) + index * g.w.count * channels_;
    for (int64_t r = 0; r < g.h.taps; ++r) {
      const int64_t h = i * g.h.step + g.h.first + r * g.h.hop;
      if (h < 0 || h >= g.h.size) continue;
      const auto* source =
          static_cast<const T*>(args.input) + (n * g.h.size + h) * g.w.size * channels_;
      call_.ops.depthwise_wgrad(channels_, g.w, grad, source, sum + r * g.w.taps * ld_, ld_);
    }
  }

  IgemmCall<T> call_;
  const int64_t channels_, ld_, parts_;
};

template <class F>
decltype(auto) with_depthwise(const Conv2dProblem& p, Direction direction, CpuIsa isa, F&& f) {
  return dispatch_dtype(p.dtype, [&](auto zero) {
    // wgrad gathers what fprop does.
    const Direction gather = direction == Direction::kDgrad ? direction : Direction::kFprop;
    DepthwiseNhwc<decltype(zero)> depthwise(p, gather, isa);
    return f(depthwise);
  });
}

}  // namespace

size_t conv2d_depthwise_nhwc_workspace(const Conv2dProblem& p, Direction direction, CpuIsa isa) {
  return with_depthwise(p, direction, isa, [&](auto& depthwise) {
    return direction == Direction::kWgrad ? depthwise.parts_bytes() : depthwise.filter_bytes();
  });
}

void conv2d_depthwise_nhwc(const Conv2dProblem& p, Direction direction, CpuIsa isa,
                           const Conv2dArgs& args, const Context& context) {
  with_depthwise(p, direction, isa, [&](auto& depthwise) {
    direction == Direction::kWgrad ? depthwise.run_wgrad(args, context)
                                   : depthwise.run(args, context);
  });
}

}  // namespace fastconv
