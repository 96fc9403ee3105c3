// BatchNorm, one copy for each instruction set.
//
// Both directions have two steps. First two sums a channel: the moments of the input (forward), or
// the sums of dz and of dz * (input - mean) (backward, with dz = grad * activation'(z), computed in
// both steps or kept as the residual's gradient). Then every element is computed from its channel's
// few coefficients. In NCHW with 64 channels or more, one channel does both steps before the next,
// so that the second finds its input in the cache.
#include "cpu/lanes.inl"
//
#include "cpu/activation.inl"
//
#include "cpu/batch_norm_sums.inl"

namespace fastconv {
namespace FASTCONV_ISA {

// y = (x - mean) * scale + shift. In training the part of the mean that A cannot hold goes into the
// shift: with a mean of 1e4 it is worth 5e-4.
template <class A>
struct Normalize {
  A mean, scale, shift;

  Normalize(const BatchNormProblem& t, const BatchNormArgs& a, int64_t c, double mean_c,
            double var_c) {
    const double factor = channel_value<A>(a.weight, c, 1) / std::sqrt(var_c + t.eps);
    mean = static_cast<A>(mean_c);
    scale = static_cast<A>(factor);
    shift = static_cast<A>(channel_value<A>(a.bias, c, 0) -
                           (mean_c - static_cast<double>(mean)) * factor);
  }
  static constexpr int64_t kCount = 3;
  A at(int64_t i) const { return i == 0 ? mean : i == 1 ? scale : shift; }
};

// dx = ((dz - mean of dz) - (x - mean) * slope) * scale; in inference dx = dz * scale. The bias is
// for computing z again.
template <class A>
struct Differentiate {
  A mean, grad_mean, slope, scale, bias;

  Differentiate(const BatchNormProblem& t, const BatchNormArgs& a, int64_t c, double sum,
                double dot) {
    const double invstd = 1 / std::sqrt(channel_value<A>(a.var_in, c, 1) + t.eps);
    const double count = static_cast<double>(std::max<int64_t>(t.per_channel(), 1));
    mean = static_cast<A>(channel_value<A>(a.mean_in, c, 0));
    grad_mean = static_cast<A>(sum / count);
    slope = static_cast<A>(dot * invstd * invstd / count);
    scale = static_cast<A>(invstd * channel_value<A>(a.weight, c, 1));
    bias = static_cast<A>(channel_value<A>(a.bias, c, 0));
    static_cast<A*>(a.grad_weight)[c] = static_cast<A>(dot * invstd);
    static_cast<A*>(a.grad_bias)[c] = static_cast<A>(sum);
  }
  static constexpr int64_t kCount = BatchNormPlan::kCoefficients;
  A at(int64_t i) const {
    return i == 0 ? mean : i == 1 ? grad_mean : i == 2 ? slope : i == 3 ? scale : bias;
  }
};

// One vector of the second step: `lanes` elements from i on. k are the coefficients above, in
// order.
template <bool kDgrad, class T, After kAfter>
FASTCONV_INLINE void second_step(const Elements<T, kAfter>& e, int64_t i, int64_t lanes,
                                 const Vec<accumulator_t<T>>* k) {
  using A = accumulator_t<T>;
  const Vec<A> none{};
  if constexpr (!kDgrad) {
    const Vec<A> x = load_upto(e.input + i, lanes, none);
    const Affine<A> affine{k[0], k[1], k[2]};
    if constexpr (kAfter == After::kNothing) {
      store_upto(e.out + i, affine.of(x), lanes);
    } else {
      const Vec<A> z = before_activation(e, i, lanes, x, affine);
      store_upto(e.out + i, activate_vector(z, e.activation, e.slope), lanes);
    }
  } else {
    const bool needs_x = e.training || kAfter != After::kNothing;
    const Vec<A> x = needs_x ? load_upto(e.input + i, lanes, none) : none;
    const Vec<A> dz = gradient_of_z(e, i, lanes, x, Affine<A>{k[0], k[3], k[4]});
    store_upto(e.out + i, (e.training ? (dz - k[1]) - (x - k[0]) * k[2] : dz) * k[3], lanes);
  }
}

// Calls f(after, args) with what the second step is run on: where the first has written the
// residual's gradient, that one, behind which nothing follows.
template <bool kDgrad, After kAfter, class F>
FASTCONV_INLINE void with_second_step(const BatchNormArgs& a, F&& f) {
  if (kDgrad && kAfter != After::kNothing && a.grad_residual != nullptr) {
    BatchNormArgs written = a;
    written.grad = a.grad_residual;
    f(std::integral_constant<After, After::kNothing>(), written);
  } else {
    f(std::integral_constant<After, kAfter>(), a);
  }
}

// ---- NCHW ----------------------------------------------------------------------------------

// n elements from `begin` on.
template <class T, bool kDgrad, After kAfter, class Coefficients>
void second_step_of_plane(const BatchNormProblem& t, const BatchNormArgs& a, int64_t begin,
                          int64_t n, const Coefficients& coefficients) {
  using A = accumulator_t<T>;
  constexpr int64_t L = Lanes<A>::kCount;
  Vec<A> k[Coefficients::kCount];
  for (int64_t i = 0; i < Coefficients::kCount; ++i) k[i] = broadcast<A>(coefficients.at(i));
  const Elements<T, kAfter> elements(t, a);
  int64_t i = 0;
  for (; i + L <= n; i += L) second_step<kDgrad>(elements, begin + i, L, k);
  if (i < n) second_step<kDgrad>(elements, begin + i, n - i, k);
}

// Joins the slices' sums of channels [begin, end), in order, in the place of the first slice's.
template <bool kDgrad>
void join_slices(const BatchNormPlan& plan, double* partial, int64_t begin, int64_t end) {
  double* first = partial;
  double* second = partial + plan.C;
  double count = plan.slice_count(0);
  for (int64_t slice = 1; slice < plan.slices; ++slice) {
    const double* other_first = partial + slice * 2 * plan.C;
    const double* other_second = other_first + plan.C;
    const double other_count = plan.slice_count(slice);
    if constexpr (kDgrad) {
      for (int64_t c = begin; c < end; ++c) {
        first[c] += other_first[c];
        second[c] += other_second[c];
      }
    } else if (other_count > 0) {
      const double share = other_count / (count + other_count);  // as Moments::merge
      for (int64_t c = begin; c < end; ++c) {
        const double delta = other_first[c] - first[c];
        first[c] += delta * share;
        second[c] += other_second[c] + delta * delta * count * share;
      }
    }
    count += other_count;
  }
}

// The first step's result for channel c: mean and variance, or the two sums of backward.
template <class T, bool kDgrad>
struct ChannelResult {
  double first, second;

  ChannelResult(const BatchNormProblem& t, const BatchNormArgs& a, const BatchNormPlan& plan,
                const double* joined, int64_t c) {
    using A = accumulator_t<T>;
    if (!kDgrad && !t.training) {
      first = channel_value<A>(a.mean_in, c, 0);
      second = channel_value<A>(a.var_in, c, 1);
      return;
    }
    first = joined[c];
    second = joined[plan.C + c];
    if constexpr (!kDgrad) {
      second /= static_cast<double>(std::max<int64_t>(plan.M, 1));
      static_cast<A*>(a.mean_out)[c] = static_cast<A>(first);
      static_cast<A*>(a.var_out)[c] = static_cast<A>(second);
    }
  }
};

template <class T, bool kDgrad, After kAfter>
void channels_of_planes(const BatchNormProblem& t, const BatchNormArgs& a, const Context& context) {
  using A = accumulator_t<T>;
  using Coefficients = std::conditional_t<kDgrad, Differentiate<A>, Normalize<A>>;
  const BatchNormPlan plan(t);
  double* partial = static_cast<double*>(a.workspace);
  const auto first_step = [&](int64_t begin, int64_t end) {
    if (!kDgrad && !t.training) return;  // no sums
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t c = unit / plan.slices, slice = unit % plan.slices;
      sum_slice_of_planes<T, kDgrad, kAfter>(t, a, plan, c, slice, partial + slice * 2 * plan.C);
    }
  };
  const auto coefficients_of = [&](int64_t c) {
    const ChannelResult<T, kDgrad> result(t, a, plan, partial, c);
    return Coefficients(t, a, c, result.first, result.second);
  };
  const auto plane_step = [&](int64_t n, int64_t c, const Coefficients& coefficients) {
    with_second_step<kDgrad, kAfter>(a, [&](auto after, const BatchNormArgs& args) {
      second_step_of_plane<T, kDgrad, decltype(after)::value>(t, args, (n * plan.C + c) * plan.HW,
                                                              plan.HW, coefficients);
    });
  };
  const bool fused = plan.slices == 1 && (kDgrad || t.training);
  if (fused) {
    for_ranges(context, plan.C, t.bytes(), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        first_step(c, c + 1);
        const Coefficients coefficients = coefficients_of(c);
        if (a.out == nullptr) continue;
        for (int64_t n = 0; n < plan.N; ++n) plane_step(n, c, coefficients);
      }
    });
    return;
  }
  // Too few channels to go round: threads share a channel's slices, then its planes. Inference has
  // no sums and takes the planes as they lie in memory.
  for_ranges(context, plan.C * plan.slices, t.bytes(), first_step);
  if (kDgrad || t.training) join_slices<kDgrad>(plan, partial, 0, plan.C);
  std::vector<Coefficients> coefficients;
  for (int64_t c = 0; c < plan.C; ++c) coefficients.push_back(coefficients_of(c));
  if (a.out == nullptr) return;
  for_ranges(context, plan.N * plan.C, t.bytes(), [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      plane_step(plane / plan.C, plane % plan.C, coefficients[plane % plan.C]);
    }
  });
}

// ---- NHWC ----------------------------------------------------------------------------------

// Rows [begin, end).
template <class T, bool kDgrad, After kAfter, class Coefficients>
void second_step_of_rows(const BatchNormProblem& t, const BatchNormArgs& a,
                         const BatchNormPlan& plan, const accumulator_t<T>* coefficients,
                         int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  constexpr int64_t L = Lanes<A>::kCount;
  const int64_t C = plan.C;
  const Elements<T, kAfter> elements(t, a);
  // Row by row, as memory streams: the coefficients come from L1.
  for (int64_t row = begin; row < end; ++row) {
    const auto step = [&](int64_t c, int64_t lanes) FASTCONV_INLINE_LAMBDA {
      Vec<A> k[Coefficients::kCount];
      for (int64_t i = 0; i < Coefficients::kCount; ++i) {
        k[i] = load(coefficients + i * (C + 16) + c);
      }
      second_step<kDgrad>(elements, row * C + c, lanes, k);
    };
    int64_t c = 0;
    for (; c + L <= C; c += L) step(c, L);
    if (c < C) step(c, C - c);
  }
}

template <class T, bool kDgrad, After kAfter>
void channels_of_rows(const BatchNormProblem& t, const BatchNormArgs& a, const Context& context) {
  using A = accumulator_t<T>;
  using Coefficients = std::conditional_t<kDgrad, Differentiate<A>, Normalize<A>>;
  const BatchNormPlan plan(t);
  double* partial = static_cast<double*>(a.workspace);
  A* coefficients = reinterpret_cast<A*>(partial + plan.partial_doubles());
  if (kDgrad || t.training) {
    for_ranges(context, plan.slices * plan.groups(), t.bytes(), [&](int64_t begin, int64_t end) {
      RowSums<T, kDgrad, kAfter> sums(t, a, plan);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t slice = unit / plan.groups(), group = unit % plan.groups();
        sums.slice(slice, group * BatchNormPlan::kGroup, partial + slice * 2 * plan.C);
      }
    });
  }
  const double merged_bytes = 8.0 * static_cast<double>(plan.partial_doubles());
  for_ranges(context, plan.C, merged_bytes, [&](int64_t begin, int64_t end) {
    if (kDgrad || t.training) join_slices<kDgrad>(plan, partial, begin, end);
    for (int64_t c = begin; c < end; ++c) {
      const ChannelResult<T, kDgrad> result(t, a, plan, partial, c);
      const Coefficients of_channel(t, a, c, result.first, result.second);
      for (int64_t i = 0; i < Coefficients::kCount; ++i) {
        coefficients[i * (plan.C + 16) + c] = of_channel.at(i);
      }
    }
  });
  if (a.out == nullptr) return;
  for_ranges(context, plan.M, t.bytes(), [&](int64_t begin, int64_t end) {
    with_second_step<kDgrad, kAfter>(a, [&](auto after, const BatchNormArgs& args) {
      second_step_of_rows<T, kDgrad, decltype(after)::value, Coefficients>(
          t, args, plan, coefficients, begin, end);
    });
  });
}

template <bool kDgrad, After kAfter>
void launch_batch_norm(const BatchNormProblem& t, const BatchNormArgs& a, const Context& context) {
  dispatch_dtype(t.dtype, [&](auto type) {
    using T = decltype(type);
    const bool rows = BatchNormPlan(t).by_rows;
    if (rows) {
      channels_of_rows<T, kDgrad, kAfter>(t, a, context);
    } else {
      channels_of_planes<T, kDgrad, kAfter>(t, a, context);
    }
  });
}

template <bool kDgrad>
void launch_batch_norm(const BatchNormProblem& t, const BatchNormArgs& a, const Context& context) {
  const bool residual = (kDgrad ? a.grad_residual : a.residual) != nullptr;
  if (t.activation == Activation::kReLU) {
    launch_batch_norm<kDgrad, After::kReLU>(t, a, context);
  } else if (residual || t.activation != Activation::kNone) {
    launch_batch_norm<kDgrad, After::kAnything>(t, a, context);
  } else {
    launch_batch_norm<kDgrad, After::kNothing>(t, a, context);
  }
}

void batch_norm_fprop(const BatchNormProblem& t, const BatchNormArgs& a, const Context& context) {
  launch_batch_norm<false>(t, a, context);
}

void batch_norm_dgrad(const BatchNormProblem& t, const BatchNormArgs& a, const Context& context) {
  launch_batch_norm<true>(t, a, context);
}

}  // namespace FASTCONV_ISA
}  // namespace fastconv
