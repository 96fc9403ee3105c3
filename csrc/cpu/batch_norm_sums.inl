// BatchNorm's sums over a channel, one copy for each instruction set. Included by batch_norm.inl.
//
// Sums of either sign are float64, of terms computed in float64: a sum of a thousand differences
// has hardly more error than its last rounding.
//
// Forward, the moments of a block are mean = sum(x) / n and M2 = sum(d * d) - sum(d)^2 / n, with
// d = x - shift for a shift near the mean. What the subtraction loses grows with (shift - mean)^2 /
// variance. NCHW takes the block's own mean (a block is read again from L1). NHWC takes the mean of
// the block's first 8 rows, which is at most sqrt(128 / 8 - 1) standard deviations off, for any
// data: 4 bits in the worst case.

namespace fastconv {
namespace FASTCONV_ISA {

template <class A>
FASTCONV_INLINE double channel_value(const void* values, int64_t c, double when_null) {
  return values == nullptr ? when_null : static_cast<double>(static_cast<const A*>(values)[c]);
}

// ---- What follows the normalisation --------------------------------------------------------

// Known to the compiler: nothing, ReLU (with or without a residual), or whatever the problem says.
enum class After { kNothing, kReLU, kAnything };

// A call's tensors and what a vector of them goes through. A copy on the stack: what stands behind
// a pointer would be read again after every store, which might have changed it.
template <class T, After kAfter>
struct Elements {
  using A = accumulator_t<T>;
  const T *input, *residual, *grad, *output;
  T *out, *grad_residual;
  bool training;
  Activation activation;
  A slope;

  Elements(const BatchNormProblem& t, const BatchNormArgs& a)
      : input(static_cast<const T*>(a.input)),
        residual(static_cast<const T*>(a.residual)),
        grad(static_cast<const T*>(a.grad)),
        output(static_cast<const T*>(a.output)),
        out(static_cast<T*>(a.out)),
        grad_residual(static_cast<T*>(a.grad_residual)),
        training(t.training),
        activation(kAfter == After::kReLU ? Activation::kReLU : t.activation),
        slope(static_cast<A>(t.slope)) {}
};

// A channel's z = (x - mean) * scale + shift, before the residual.
template <class A>
struct Affine {
  Vec<A> mean, scale, shift;
  FASTCONV_INLINE Vec<A> of(Vec<A> x) const { return (x - mean) * scale + shift; }
};

// z of `lanes` elements from i on, with the residual.
template <class T, After kAfter>
FASTCONV_INLINE Vec<accumulator_t<T>> before_activation(const Elements<T, kAfter>& e, int64_t i,
                                                        int64_t lanes, Vec<accumulator_t<T>> x,
                                                        const Affine<accumulator_t<T>>& affine) {
  const auto z = affine.of(x);
  return e.residual == nullptr ? z : z + load_upto(e.residual + i, lanes, Vec<accumulator_t<T>>{});
}

// Backward: the gradient of z, of `lanes` elements from i on; 0 in the other lanes.
template <class T, After kAfter>
FASTCONV_INLINE Vec<accumulator_t<T>> gradient_of_z(const Elements<T, kAfter>& e, int64_t i,
                                                    int64_t lanes, Vec<accumulator_t<T>> x,
                                                    const Affine<accumulator_t<T>>& affine) {
  using A = accumulator_t<T>;
  const Vec<A> grad = load_upto(e.grad + i, lanes, Vec<A>{});
  if constexpr (kAfter == After::kNothing) {
    return grad;
  } else {
    if (e.activation == Activation::kNone) return grad;
    const Vec<A> z = e.output != nullptr ? load_upto(e.output + i, lanes, Vec<A>{})
                                         : before_activation(e, i, lanes, x, affine);
    return gradient_vector(grad, z, e.activation, e.slope);
  }
}

// The same for the first step, which writes it where the residual's gradient is wanted: the second
// step then reads that instead of the gradient, and of what the activation's derivative takes.
template <class T, After kAfter>
FASTCONV_INLINE Vec<accumulator_t<T>> summed_gradient(const Elements<T, kAfter>& e, int64_t i,
                                                      int64_t lanes, Vec<accumulator_t<T>> x,
                                                      const Affine<accumulator_t<T>>& affine) {
  const auto dz = gradient_of_z(e, i, lanes, x, affine);
  if constexpr (kAfter != After::kNothing) {
    if (e.grad_residual != nullptr) store_upto(e.grad_residual + i, dz, lanes);
  }
  return dz;
}

// Of backward: mean and scale as forward has them, but for the rounding of the mean.
template <class A>
struct BackwardAffine {
  A mean, scale, shift;
  BackwardAffine(const BatchNormProblem& t, const BatchNormArgs& a, int64_t c)
      : mean(static_cast<A>(channel_value<A>(a.mean_in, c, 0))),
        scale(static_cast<A>(channel_value<A>(a.weight, c, 1) /
                             std::sqrt(channel_value<A>(a.var_in, c, 1) + t.eps))),
        shift(static_cast<A>(channel_value<A>(a.bias, c, 0))) {}
  FASTCONV_INLINE Affine<A> lanes() const {
    return {broadcast<A>(mean), broadcast<A>(scale), broadcast<A>(shift)};
  }
};

// ---- NCHW ----------------------------------------------------------------------------------

// Calls f(offset, length) with the contiguous runs of channel c's block.
template <class F>
FASTCONV_INLINE void for_each_run(const BatchNormPlan& plan, int64_t c, int64_t block, F&& f) {
  if (plan.chunks_of_plane > 1) {
    const int64_t n = block / plan.chunks_of_plane;
    const int64_t begin = std::min(plan.HW, block % plan.chunks_of_plane * plan.chunk);
    f((n * plan.C + c) * plan.HW + begin, std::min(plan.HW - begin, plan.chunk));
    return;
  }
  const int64_t end = std::min(plan.N, (block + 1) * plan.planes_of_block);
  for (int64_t n = block * plan.planes_of_block; n < end; ++n) {
    f((n * plan.C + c) * plan.HW, plan.HW);
  }
}

// Whether elements are as wide as sums: a mean is then summed as shift + sum(d) / n.
template <class A>
constexpr bool kShifted = sizeof(A) == 8;

// Four vectors' sum. Of 16-bit elements, which have 11 bits at most, it is as good as exact in
// float; the others are widened first.
template <class T>
FASTCONV_INLINE Wide<accumulator_t<T>> wide_sum(Vec<accumulator_t<T>> a, Vec<accumulator_t<T>> b,
                                                Vec<accumulator_t<T>> c, Vec<accumulator_t<T>> d) {
  using W = Wide<accumulator_t<T>>;
  if constexpr (sizeof(T) == 2) return W((a + b) + (c + d));
  return (W(a) + W(b)) + (W(c) + W(d));
}

// Adds, over n elements, two terms: term(i, lanes, a, b) gives vectors from element i on, of which
// the first `lanes` count and the others must be 0.
template <class A>
struct TwoSums {
  Wide<A> first, second;

  template <class Term>
  FASTCONV_INLINE void add(int64_t n, Term&& term) {
    constexpr int64_t L = Lanes<A>::kCount;
    Wide<A> a, b;
    int64_t i = 0;
    for (; i + 2 * L <= n; i += 2 * L) {
      Wide<A> c, d;
      term(i, L, a, b);
      term(i + L, L, c, d);
      first += a + c;
      second += b + d;
    }
    for (; i < n; i += L) {
      term(i, n - i, a, b);
      first += a;
      second += b;
    }
  }
};

// The mean comes of a float64 sum of the elements, or of d where the elements are float64
// themselves and their sum would round at their own size; of M2, all of one sign, runs of four may
// be added in A.
template <class T>
void merge_block(const T* input, const BatchNormPlan& plan, int64_t c, int64_t block,
                 Moments& moments) {
  using A = accumulator_t<T>;
  constexpr int64_t L = Lanes<A>::kCount;
  const double n =
      static_cast<double>(plan.elements_before(block + 1) - plan.elements_before(block));
  if (n == 0) return;
  Wide<A> sum;
  for_each_run(plan, c, block, [&](int64_t offset, int64_t length) FASTCONV_INLINE_LAMBDA {
    const T* x = input + offset;
    int64_t i = 0;
    for (; i + 4 * L <= length; i += 4 * L) {
      sum += wide_sum<T>(load(x + i), load(x + i + L), load(x + i + 2 * L), load(x + i + 3 * L));
    }
    for (; i < length; i += L) sum += Wide<A>(load_upto(x + i, length - i, Vec<A>{}));
  });
  const double total = sum.over_lanes();
  const A near_mean = static_cast<A>(total / n);
  const Vec<A> shift = broadcast<A>(near_mean);
  Wide<A> squares, differences;
  for_each_run(plan, c, block, [&](int64_t offset, int64_t length) FASTCONV_INLINE_LAMBDA {
    const T* x = input + offset;
    int64_t i = 0;
    for (; i + 4 * L <= length; i += 4 * L) {
      Vec<A> run{};
      for (int64_t v = 0; v < 4; ++v) {
        const Vec<A> d = load(x + i + v * L) - shift;
        if constexpr (kShifted<A>) differences += Wide<A>(d);
        run += d * d;
      }
      squares += Wide<A>(run);
    }
    Vec<A> run{};
    for (; i < length; i += L) {
      const Vec<A> d = load_upto(x + i, length - i, shift) - shift;
      if constexpr (kShifted<A>) differences += Wide<A>(d);
      run += d * d;
    }
    squares += Wide<A>(run);
  });
  const double d = kShifted<A> ? differences.over_lanes() : total - n * double{near_mean};
  moments.merge(n, double{near_mean} + d / n, std::max(0.0, squares.over_lanes() - d * d / n));
}

// Slice `slice` of channel c, to result[c] and result[C + c].
template <class T, bool kDgrad, After kAfter>
void sum_slice_of_planes(const BatchNormProblem& t, const BatchNormArgs& a,
                         const BatchNormPlan& plan, int64_t c, int64_t slice, double* result) {
  using A = accumulator_t<T>;
  const T* input = static_cast<const T*>(a.input);
  const int64_t begin = plan.slice_begin(slice), end = plan.slice_begin(slice + 1);
  if constexpr (!kDgrad) {
    Moments moments;
    for (int64_t block = begin; block < end; ++block) merge_block(input, plan, c, block, moments);
    result[c] = moments.mean;
    result[plan.C + c] = moments.m2;
  } else {
    const Affine<A> affine = BackwardAffine<A>(t, a, c).lanes();
    const Elements<T, kAfter> elements(t, a);
    TwoSums<A> sums;
    for (int64_t block = begin; block < end; ++block) {
      for_each_run(plan, c, block, [&](int64_t offset, int64_t length) FASTCONV_INLINE_LAMBDA {
        const auto term = [&](int64_t i, int64_t lanes, Wide<A>& g,
                              Wide<A>& product) FASTCONV_INLINE_LAMBDA {
          const Vec<A> x = load_upto(input + offset + i, lanes, affine.mean);
          g = Wide<A>(summed_gradient(elements, offset + i, lanes, x, affine));
          product = g * (Wide<A>(x) - Wide<A>(affine.mean));
        };
        if constexpr (kShifted<A>) {  // short sums, then their sum: float64 has nothing wider
          TwoSums<A> of_run;
          of_run.add(length, term);
          sums.first += of_run.first;
          sums.second += of_run.second;
        } else {
          sums.add(length, term);
        }
      });
    }
    result[c] = sums.first.over_lanes();
    result[plan.C + c] = sums.second.over_lanes();
  }
}

// ---- NHWC ----------------------------------------------------------------------------------

// A thread's sums over rows of up to kGroup channels.
template <class T, bool kDgrad, After kAfter>
class RowSums {
  using A = accumulator_t<T>;
  static constexpr int64_t L = Lanes<A>::kCount;
  static constexpr int64_t kRoom = BatchNormPlan::kGroup + L;

 public:
  RowSums(const BatchNormProblem& t, const BatchNormArgs& a, const BatchNormPlan& plan)
      : t_(t),
        a_(a),
        plan_(plan),
        shift_(kRoom),
        scale_(kAfter == After::kNothing ? 0 : kRoom),
        bias_(kAfter == After::kNothing ? 0 : kRoom),
        first_(kRoom),
        second_(kRoom),
        mean_(kRoom),
        m2_(kRoom) {}

  // Channels [c0, c0 + kGroup) of slice `slice`, to result[c] and result[C + c].
  void slice(int64_t slice, int64_t c0, double* result) {
    const int64_t channels = std::min(BatchNormPlan::kGroup, plan_.C - c0);
    const int64_t begin = plan_.slice_begin(slice), end = plan_.slice_begin(slice + 1);
    clear();
    if constexpr (kDgrad) {
      for (int64_t c = 0; c < channels; ++c) {
        const BackwardAffine<A> of_channel(t_, a_, c0 + c);
        shift_[c] = of_channel.mean;
        if constexpr (kAfter != After::kNothing) {
          scale_[c] = of_channel.scale;
          bias_[c] = of_channel.shift;
        }
      }
      add_rows(plan_.elements_before(begin), plan_.elements_before(end), c0, channels);
      std::copy_n(first_.begin(), channels, result + c0);
      std::copy_n(second_.begin(), channels, result + plan_.C + c0);
    } else {
      std::fill(mean_.begin(), mean_.end(), 0.0);
      std::fill(m2_.begin(), m2_.end(), 0.0);
      double count = 0;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = plan_.elements_before(block),
                      rows = plan_.elements_before(block + 1) - row;
        near_mean(row, std::min<int64_t>(rows, 8), c0, channels);
        clear();
        add_rows(row, row + rows, c0, channels);
        merge(count, static_cast<double>(rows), channels);
        count += static_cast<double>(rows);
      }
      std::copy_n(mean_.begin(), channels, result + c0);
      std::copy_n(m2_.begin(), channels, result + plan_.C + c0);
    }
  }

 private:
  void clear() {
    std::fill(first_.begin(), first_.end(), 0.0);
    std::fill(second_.begin(), second_.end(), 0.0);
  }
  // shift_ = mean of the first few rows.
  void near_mean(int64_t row, int64_t rows, int64_t c0, int64_t channels) {
    const T* x = static_cast<const T*>(a_.input) + row * plan_.C + c0;
    for (int64_t c = 0; c < channels; c += L) {
      Vec<A> sum{};
      for (int64_t r = 0; r < rows; ++r) {
        sum += load_upto(x + r * plan_.C + c, channels - c, Vec<A>{});
      }
      store(shift_.data() + c, sum / broadcast<A>(static_cast<A>(rows)));
    }
  }
  // Adds rows [begin, end) to first_ and second_, four rows to a visit.
  void add_rows(int64_t begin, int64_t end, int64_t c0, int64_t channels) {
    const T* input = static_cast<const T*>(a_.input) + c0;
    const T* grad = static_cast<const T*>(kDgrad ? a_.grad : a_.input) + c0;
    const int64_t C = plan_.C;
    const Elements<T, kAfter> elements(t_, a_);
    const auto add = [&](int64_t at, auto count, int64_t c, int64_t lanes) FASTCONV_INLINE_LAMBDA {
      constexpr int64_t kCount = decltype(count)::value;
      const Vec<A> shift = load(shift_.data() + c);
      Affine<A> affine{shift, {}, {}};
      if constexpr (kAfter != After::kNothing) {
        affine.scale = load(scale_.data() + c);
        affine.shift = load(bias_.data() + c);
      }
      Vec<A> x[kCount], summed[kCount];
      for (int64_t r = 0; r < kCount; ++r) {
        const int64_t i = at + r * C + c;
        x[r] = load_upto(input + i, lanes, Vec<A>{});
        // Four rows at once are not the order in which memory streams: ask for the next four.
        __builtin_prefetch(input + i + 4 * C);
        if constexpr (kDgrad) {
          __builtin_prefetch(grad + i + 4 * C);
          summed[r] = summed_gradient(elements, c0 + i, lanes, x[r], affine);
        } else {
          summed[r] = kShifted<A> ? x[r] - shift : x[r];
        }
      }
      Wide<A> first(summed[0]), second;
      if constexpr (kCount == 4) first = wide_sum<T>(summed[0], summed[1], summed[2], summed[3]);
      if constexpr (kDgrad) {
        for (int64_t r = 0; r < kCount; ++r) {
          second += Wide<A>(summed[r]) * (Wide<A>(x[r]) - Wide<A>(shift));
        }
      } else {
        Vec<A> run{};
        for (int64_t r = 0; r < kCount; ++r) run += (x[r] - shift) * (x[r] - shift);
        second = Wide<A>(run);
      }
      add_to(first_.data() + c, first);
      add_to(second_.data() + c, second);
    };
    const auto add_all = [&](int64_t row, auto count) FASTCONV_INLINE_LAMBDA {
      int64_t c = 0;
      for (; c + L <= channels; c += L) add(row * C, count, c, L);
      if (c < channels) add(row * C, count, c, channels - c);
    };
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) add_all(row, std::integral_constant<int64_t, 4>());
    for (; row < end; ++row) add_all(row, std::integral_constant<int64_t, 1>());
  }
  static FASTCONV_INLINE void add_to(double* sums, const Wide<A>& v) {
    for (int i = 0; i < Wide<A>::kParts; ++i) {
      double* at = sums + i * Lanes<double>::kCount;
      store(at, load(at) + v.part[i]);
    }
  }
  // Moments::merge for every channel at once: the counts are the same for all.
  void merge(double count, double rows, int64_t channels) {
    const double share = rows / (count + rows);
    for (int64_t c = 0; c < channels; ++c) {
      const double near = static_cast<double>(shift_[c]);
      const double d = kShifted<A> ? first_[c] : first_[c] - rows * near;
      const double delta = near + d / rows - mean_[c];
      mean_[c] += delta * share;
      m2_[c] += std::max(0.0, second_[c] - d * d / rows) + delta * delta * count * share;
    }
  }

  const BatchNormProblem& t_;
  const BatchNormArgs& a_;
  const BatchNormPlan& plan_;
  std::vector<A> shift_;
  std::vector<A> scale_, bias_;  // of backward, where z is computed again
  std::vector<double> first_, second_, mean_, m2_;
};

}  // namespace FASTCONV_ISA
}  // namespace fastconv
