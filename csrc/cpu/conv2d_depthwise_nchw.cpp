// Depthwise convolution on NCHW tensors: fprop, dgrad and wgrad, a plane at a time.
#include "cpu/conv2d_depthwise.h"

#include <algorithm>

#include "cpu/conv2d_planes.h"

namespace fastconv {
namespace {

template <class T>
class DepthwiseNchw {
 public:
  using Acc = accumulator_t<T>;

  DepthwiseNchw(const Conv2dProblem& problem, Direction direction, CpuIsa isa, int threads)
      : call_(problem, direction, isa, threads), taps_(problem.R * problem.S) {
    plans_.reserve(call_.passes.size());
    for (const Pass& pass : call_.passes) plans_.push_back(plan(pass));
  }

  size_t workspace_bytes() {
    Scratch scratch;
    carve(scratch);
    return scratch.used();
  }

  // A pass at a time, since each has paddings of its own that are set to zero once.
  void run(const Conv2dArgs& args, const Context& context) {
    call_.bind(args);
    Scratch scratch(args.workspace);
    carve(scratch);
    const int64_t channels = call_.p.C, planes = call_.p.N * channels;
    for_each_worker(context, [&](int64_t worker) {
      const Share share = share_of(planes, worker, call_.threads);
      Acc* plane = plane_ + worker * worker_stride_;
      Acc* sums = sums_ + worker * worker_stride_;
      Acc* filter = filter_ + worker * worker_stride_;
      for (size_t i = 0; i < plans_.size(); ++i) {
        const Pass& pass = call_.passes[i];
        const DepthwisePlane p = plans_[i].view();
        std::fill_n(plane, plans_[i].plane_size, Acc(0));
        for (int64_t unit = share.begin; unit < share.end; ++unit) {
          const int64_t c = unit % channels;
          call_.ops.copy_plane(p, call_.source + unit * pass.gather.h.size * pass.gather.w.size,
                               plane);
          load_filter(pass, c, filter);
          const int64_t at = (unit * pass.out.H + pass.out.first_h) * pass.out.W + pass.out.first_w;
          RowEpilogue<T> epilogue = call_.epilogue_of(c, false);
          if (call_.fprop && call_.p.epilogue.residual) {
            epilogue.residual = static_cast<const T*>(args.residual) + at;
          }
          call_.ops.depthwise_plane(p, plane, filter, sums, epilogue, call_.out + at);
        }
      }
    });
  }

  // A channel's images one after the other, in order.
  void run_wgrad(const Conv2dArgs& args, const Context& context) {
    Scratch scratch(args.workspace);
    carve(scratch);
    const Plan& plan = plans_[0];
    const Gather& g = call_.passes[0].gather;
    const DepthwisePlane p = plan.view();
    // The gradient, spread to the plane's row length.
    const PhaseCopy spread = {p.rows, p.columns, 0, p.columns, 1, 0};
    DepthwisePlane grad_plane = p;
    grad_plane.phases = 1;
    grad_plane.copies = &spread;
    for_each_worker(context, [&](int64_t worker) {
      const Share share = share_of(call_.p.C, worker, call_.threads);
      Acc* plane = plane_ + worker * worker_stride_;
      Acc* grad = sums_ + worker * worker_stride_;
      Acc* sum = filter_ + worker * worker_stride_;
      std::fill_n(plane, plan.plane_size, Acc(0));
      std::fill_n(grad, plan.sums_size, Acc(0));
      for (int64_t c = share.begin; c < share.end; ++c) {
        std::fill_n(sum, taps_, Acc(0));
        for (int64_t n = 0; n < call_.p.N; ++n) {
          const int64_t unit = n * call_.p.C + c;
          call_.ops.copy_plane(p, static_cast<const T*>(args.input) + unit * g.h.size * g.w.size,
                               plane);
          call_.ops.copy_plane(grad_plane,
                               static_cast<const T*>(args.grad) + unit * p.rows * p.columns, grad);
          call_.ops.depthwise_plane_wgrad(p, plane, grad, sum);
        }
        // With one channel a group, KCRS and KRSC are the same.
        T* out = static_cast<T*>(args.out) + c * taps_;
        for (int64_t t = 0; t < taps_; ++t) out[t] = T(sum[t]);
      }
    });
  }

 private:
  struct Plan {
    PlaneAxis h, w;
    std::vector<PhaseCopy> copies;
    std::vector<int64_t> offsets;
    int64_t rows = 0, columns = 0, out_row = 0, out_column = 0;
    int64_t plane_size = 0, sums_size = 0;

    DepthwisePlane view() const {
      return {static_cast<int64_t>(copies.size()),
              copies.data(),
              w.length,
              static_cast<int64_t>(offsets.size()),
              offsets.data(),
              rows,
              columns,
              out_row,
              out_column};
    }
  };

  // Of one phase along one axis: how many elements, from where, to where.
  struct Piece {
    int64_t count, source, plane;
  };
  static Piece inside(const GatherAxis& a, int64_t length, int64_t phase) {
    const int64_t first = WindowAxis(a).low + phase;  // source position of the phase's element 0
    const int64_t low = first >= 0 ? 0 : divide_up(-first, a.step);
    const int64_t high = first >= a.size ? 0 : std::min(length, (a.size - 1 - first) / a.step + 1);
    return {std::max<int64_t>(0, high - low), first + low * a.step, low};
  }

  Plan plan(const Pass& pass) const {
    const Gather& g = pass.gather;
    Plan plan;
    plan.h = PlaneAxis(g.h, g.h.count);
    plan.w = PlaneAxis(g.w, g.w.count);
    for (size_t r = 0; r < plan.h.phases.size(); ++r) {
      const Piece rows = inside(g.h, plan.h.length, plan.h.phases[r]);
      for (size_t s = 0; s < plan.w.phases.size(); ++s) {
        const Piece columns = inside(g.w, plan.w.length, plan.w.phases[s]);
        if (rows.count == 0 || columns.count == 0) continue;
        plan.copies.push_back(
            {rows.count, columns.count, rows.source * g.w.size + columns.source,
             g.h.step * g.w.size, g.w.step,
             phase_start(plan.h, plan.w, static_cast<int64_t>(r), static_cast<int64_t>(s)) +
                 rows.plane * plan.w.length + columns.plane});
      }
    }
    for (int64_t r = 0; r < g.h.taps; ++r) {
      for (int64_t s = 0; s < g.w.taps; ++s)
        plan.offsets.push_back(tap_start(plan.h, plan.w, r, s));
    }
    plan.rows = g.h.count;
    plan.columns = g.w.count;
    plan.out_row = pass.out.step_h * pass.out.W;
    plan.out_column = pass.out.step_w;
    // Whole vectors are read at the last tap of the last pixel, and written four at a time.
    const int64_t slack = 4 * call_.ops.lanes;
    plan.plane_size = plan.h.total() * plan.w.total() + slack;
    plan.sums_size = plan.rows * plan.w.length + slack;
    return plan;
  }

  void carve(Scratch& scratch) {
    int64_t plane = 0, sums = 0;
    for (const Plan& plan : plans_) {
      plane = std::max(plane, plan.plane_size);
      sums = std::max(sums, plan.sums_size);
    }
    for (int64_t worker = 0; worker < call_.threads; ++worker) {
      Acc* first = scratch.template take<Acc>(plane);
      Acc* second = scratch.template take<Acc>(sums);
      Acc* third = scratch.template take<Acc>(taps_);
      if (worker == 0) {
        plane_ = first;
        sums_ = second;
        filter_ = third;
      }
      if (worker == 1) worker_stride_ = third - filter_;
    }
  }

  void load_filter(const Pass& pass, int64_t c, Acc* filter) const {
    const T* from = call_.filter + pass.filter_offset + c * pass.group_stride;
    for (int64_t r = 0; r < pass.gather.h.taps; ++r) {
      for (int64_t s = 0; s < pass.gather.w.taps; ++s) {
        *filter++ = static_cast<Acc>(from[r * pass.filter_stride[1] + s * pass.filter_stride[2]]);
      }
    }
  }

  IgemmCall<T> call_;
  const int64_t taps_;
  std::vector<Plan> plans_;
  Acc* plane_ = nullptr;
  Acc* sums_ = nullptr;
  Acc* filter_ = nullptr;
  int64_t worker_stride_ = 0;
};

template <class F>
decltype(auto) with_depthwise(const Conv2dProblem& p, Direction direction, CpuIsa isa, int threads,
                              F&& f) {
  return dispatch_dtype(p.dtype, [&](auto zero) {
    // wgrad gathers what fprop does.
    const Direction gather = direction == Direction::kDgrad ? direction : Direction::kFprop;
    DepthwiseNchw<decltype(zero)> depthwise(p, gather, isa, threads);
    return f(depthwise);
  });
}

}  // namespace

size_t conv2d_depthwise_nchw_workspace(const Conv2dProblem& p, Direction direction, CpuIsa isa,
                                       int threads) {
  return with_depthwise(p, direction, isa, threads,
                        [&](auto& depthwise) { return depthwise.workspace_bytes(); });
}

void conv2d_depthwise_nchw(const Conv2dProblem& p, Direction direction, CpuIsa isa,
                           const Conv2dArgs& args, const Context& context) {
  with_depthwise(p, direction, isa, context.threads, [&](auto& depthwise) {
    direction == Direction::kWgrad ? depthwise.run_wgrad(args, context)
                                   : depthwise.run(args, context);
  });
}

}  // namespace fastconv
