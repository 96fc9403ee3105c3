// Convolution as a textbook writes it: the rows that take any problem, and the oracle of the
// others. Sums are kept in float64 for every dtype, so a reference result is the exact one rounded.
#include "cpu/conv2d_strides.h"
#include "cpu/table.h"

namespace fastconv {
namespace {

// Where a flat index of a logical (a, b, h, w) tensor lies.
struct Index4 {
  int64_t n, c, h, w;
  Index4(int64_t flat, int64_t C, int64_t H, int64_t W)
      : n(flat / W / H / C), c(flat / W / H % C), h(flat / W % H), w(flat % W) {}
};

template <class T>
T round_to(double z) {
  return T(static_cast<accumulator_t<T>>(z));
}

// The whole epilogue of output element `at`, which belongs to filter `k`.
template <class T>
double apply_epilogue(const Epilogue& e, const Conv2dArgs& args, int64_t k, int64_t at, double z) {
  using Acc = accumulator_t<T>;
  if (e.scale) z *= static_cast<const Acc*>(args.scale)[k];
  if (e.shift) z += static_cast<const Acc*>(args.shift)[k];
  if (e.residual) z += static_cast<double>(static_cast<const T*>(args.residual)[at]);
  return activate(z, e.activation, e.slope);
}

template <class T>
void fprop(const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
  const auto* input = static_cast<const T*>(args.input);
  const auto* filter = static_cast<const T*>(args.filter);
  auto* out = static_cast<T*>(args.out);
  const Strides4 is = input_strides(p), fs = filter_strides(p), os = output_strides(p);
  const int64_t P = p.P(), Q = p.Q(), Cg = p.C / p.G, Kg = p.K / p.G;
  context.parallel_for(p.N * p.K * P * Q, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Index4 o(i, p.K, P, Q);
      Sum<T> sum = 0;
      for (int64_t r = 0; r < p.R; ++r) {
        const int64_t h = o.h * p.stride_h - p.pad_h + r * p.dil_h;
        if (h < 0 || h >= p.H) continue;
        for (int64_t s = 0; s < p.S; ++s) {
          const int64_t w = o.w * p.stride_w - p.pad_w + s * p.dil_w;
          if (w < 0 || w >= p.W) continue;
          for (int64_t c = 0; c < Cg; ++c) {
            sum += static_cast<Sum<T>>(input[is.at(o.n, o.c / Kg * Cg + c, h, w)]) *
                   static_cast<Sum<T>>(filter[fs.at(o.c, c, r, s)]);
          }
        }
      }
      const int64_t at = os.at(o.n, o.c, o.h, o.w);
      out[at] = round_to<T>(apply_epilogue<T>(p.epilogue, args, o.c, at, sum));
    }
  });
}

// Input (h, w) was read by output (p, q) under tap (r, s) where p * stride = h + pad - r * dil.
template <class T>
void dgrad(const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
  const auto* grad = static_cast<const T*>(args.grad);
  const auto* filter = static_cast<const T*>(args.filter);
  auto* out = static_cast<T*>(args.out);
  const Strides4 is = input_strides(p), fs = filter_strides(p), os = output_strides(p);
  const int64_t P = p.P(), Q = p.Q(), Cg = p.C / p.G, Kg = p.K / p.G;
  context.parallel_for(p.input_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Index4 x(i, p.C, p.H, p.W);
      Sum<T> sum = 0;
      for (int64_t r = 0; r < p.R; ++r) {
        const int64_t ph = x.h + p.pad_h - r * p.dil_h;
        if (ph < 0 || ph % p.stride_h != 0 || ph / p.stride_h >= P) continue;
        for (int64_t s = 0; s < p.S; ++s) {
          const int64_t qw = x.w + p.pad_w - s * p.dil_w;
          if (qw < 0 || qw % p.stride_w != 0 || qw / p.stride_w >= Q) continue;
          for (int64_t k = x.c / Cg * Kg; k < (x.c / Cg + 1) * Kg; ++k) {
            sum += static_cast<Sum<T>>(grad[os.at(x.n, k, ph / p.stride_h, qw / p.stride_w)]) *
                   static_cast<Sum<T>>(filter[fs.at(k, x.c % Cg, r, s)]);
          }
        }
      }
      out[is.at(x.n, x.c, x.h, x.w)] = round_to<T>(sum);
    }
  });
}

template <class T>
void wgrad(const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
  const auto* grad = static_cast<const T*>(args.grad);
  const auto* input = static_cast<const T*>(args.input);
  auto* out = static_cast<T*>(args.out);
  const Strides4 is = input_strides(p), fs = filter_strides(p), os = output_strides(p);
  const int64_t P = p.P(), Q = p.Q(), Cg = p.C / p.G, Kg = p.K / p.G;
  context.parallel_for(p.filter_elements(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Index4 f(i, Cg, p.R, p.S);
      Sum<T> sum = 0;
      for (int64_t n = 0; n < p.N; ++n) {
        for (int64_t op = 0; op < P; ++op) {
          const int64_t h = op * p.stride_h - p.pad_h + f.h * p.dil_h;
          if (h < 0 || h >= p.H) continue;
          for (int64_t q = 0; q < Q; ++q) {
            const int64_t w = q * p.stride_w - p.pad_w + f.w * p.dil_w;
            if (w < 0 || w >= p.W) continue;
            sum += static_cast<Sum<T>>(grad[os.at(n, f.n, op, q)]) *
                   static_cast<Sum<T>>(input[is.at(n, f.n / Kg * Cg + f.c, h, w)]);
          }
        }
      }
      out[fs.at(f.n, f.c, f.h, f.w)] = round_to<T>(sum);
    }
  });
}

template <class T>
void bgrad(const Conv2dProblem& p, const Conv2dArgs& args, const Context& context) {
  const auto* grad = static_cast<const T*>(args.grad);
  auto* out = static_cast<T*>(args.out);
  const Strides4 os = output_strides(p);
  const int64_t P = p.P(), Q = p.Q();
  context.parallel_for(p.K, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      Sum<T> sum = 0;
      for (int64_t n = 0; n < p.N; ++n) {
        for (int64_t op = 0; op < P; ++op) {
          for (int64_t q = 0; q < Q; ++q) sum += static_cast<Sum<T>>(grad[os.at(n, k, op, q)]);
        }
      }
      out[k] = round_to<T>(sum);
    }
  });
}

// A multiply-add behind index arithmetic takes about 2 ns (a load-and-add of bgrad as well), and
// starting the threads about 5 us.
double cost(const Conv2dProblem& p, Direction direction, const Device& device) {
  const double steps =
      direction == Direction::kBgrad ? static_cast<double>(p.output_elements()) : p.flops() / 2;
  return 5 + steps * 2e-3 / device.threads;
}

}  // namespace

void add_cpu_conv2d_reference_rows(KernelTable& table) {
  for (const Direction direction :
       {Direction::kFprop, Direction::kDgrad, Direction::kWgrad, Direction::kBgrad}) {
    Conv2dKernel row;
    row.name = std::string("conv2d_reference_") + name_of(direction);
    row.op = "conv2d";
    row.direction = direction;
    row.backend = Backend::kCpu;
    row.arch = "portable";
    row.dtypes = kAllDTypes;
    row.layouts = kAllLayouts;
    row.cost = [direction](const Conv2dProblem& p, const Device& device) {
      return cost(p, direction, device);
    };
    row.launch = [direction](const Conv2dProblem& p, const Conv2dArgs& args,
                             const Context& context) {
      dispatch_dtype(p.dtype, [&](auto zero) {
        using T = decltype(zero);
        switch (direction) {
          case Direction::kFprop:
            return fprop<T>(p, args, context);
          case Direction::kDgrad:
            return dgrad<T>(p, args, context);
          case Direction::kWgrad:
            return wgrad<T>(p, args, context);
          case Direction::kBgrad:
            return bgrad<T>(p, args, context);
        }
      });
    };
    table.conv2d.push_back(std::move(row));
  }
}

}  // namespace fastconv
