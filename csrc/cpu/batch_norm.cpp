// BatchNorm on a CPU: the table's rows, and the plain reference.
#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/batch_norm.h"
#include "cpu/streaming.h"
#include "cpu/table.h"

#define FASTCONV_KERNEL_FILE "cpu/batch_norm.inl"
#include "cpu/for_each_isa.h"

namespace fastconv {
namespace {

// One channel of a call, every value read and computed in float64. The textbook's two passes (the
// mean, then the squared differences from it) lose nothing to cancellation.
template <class T>
struct ReferenceChannel {
  using A = accumulator_t<T>;
  const BatchNormProblem& t;
  const BatchNormArgs& a;
  int64_t c;

  double parameter(const void* values, double when_null) const {
    return values == nullptr ? when_null : static_cast<double>(static_cast<const A*>(values)[c]);
  }
  void store(void* values, double value) const {
    if (values != nullptr) static_cast<A*>(values)[c] = static_cast<A>(value);
  }
  // Calls f(i) with the offset of every element of the channel.
  template <class F>
  void for_each_element(F&& f) const {
    const int64_t HW = t.H * t.W;
    for (int64_t n = 0; n < t.N; ++n) {
      for (int64_t i = 0; i < HW; ++i) {
        f(t.layout == Layout::kNCHW ? (n * t.C + c) * HW + i : (n * HW + i) * t.C + c);
      }
    }
  }
  double at(const void* values, int64_t i) const {
    return static_cast<double>(A(static_cast<const T*>(values)[i]));
  }
  double mean() const {
    Sum<T> sum = 0;
    for_each_element([&](int64_t i) { sum += at(a.input, i); });
    return sum / static_cast<double>(t.per_channel());
  }
  double variance(double mean) const {
    Sum<T> sum = 0;
    for_each_element([&](int64_t i) {
      const double d = at(a.input, i) - mean;
      sum += d * d;
    });
    return sum / static_cast<double>(t.per_channel());
  }
  void write(void* values, int64_t i, double value) const {
    if (values != nullptr) static_cast<T*>(values)[i] = T(static_cast<A>(value));
  }

  void fprop() const {
    double m = parameter(a.mean_in, 0), var = parameter(a.var_in, 1);
    if (t.training) {
      m = t.per_channel() > 0 ? mean() : 0;
      var = t.per_channel() > 0 ? variance(m) : 0;
      store(a.mean_out, m);
      store(a.var_out, var);
    }
    const double scale = parameter(a.weight, 1) / std::sqrt(var + t.eps);
    const double bias = parameter(a.bias, 0);
    for_each_element([&](int64_t i) {
      double z = (at(a.input, i) - m) * scale + bias;
      if (a.residual != nullptr) z += at(a.residual, i);
      write(a.out, i, activate(z, t.activation, t.slope));
    });
  }

  void dgrad() const {
    const double m = parameter(a.mean_in, 0), var = parameter(a.var_in, 1);
    const double invstd = 1 / std::sqrt(var + t.eps), weight = parameter(a.weight, 1);
    const double bias = parameter(a.bias, 0);
    const auto dz = [&](int64_t i) {
      double z = 0;
      if (a.output != nullptr) {
        z = at(a.output, i);
      } else if (t.activation != Activation::kNone) {
        z = (at(a.input, i) - m) * invstd * weight + bias;
        if (a.residual != nullptr) z += at(a.residual, i);
      }
      return at(a.grad, i) * activation_derivative(z, t.activation, t.slope);
    };
    Sum<T> sum = 0, dot = 0;  // of dz, and of dz * (input - mean)
    for_each_element([&](int64_t i) {
      sum += dz(i);
      dot += dz(i) * (at(a.input, i) - m);
    });
    store(a.grad_weight, dot * invstd);
    store(a.grad_bias, sum);
    // In training the mean and the variance move with the input, which takes these two terms away.
    const double count = static_cast<double>(t.per_channel());
    const double from_mean = t.training ? sum / count : 0;
    const double from_var = t.training ? dot * invstd * invstd / count : 0;
    for_each_element([&](int64_t i) {
      const double gradient = dz(i);
      const double d = gradient - from_mean - (at(a.input, i) - m) * from_var;
      write(a.out, i, d * invstd * weight);
      write(a.grad_residual, i, gradient);
    });
  }
};

void launch_reference(const BatchNormProblem& t, const BatchNormArgs& a, const Context& context,
                      Direction direction) {
  dispatch_dtype(t.dtype, [&](auto type) {
    using T = decltype(type);
    context.parallel_for(t.C, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const ReferenceChannel<T> channel{t, a, c};
        if (direction == Direction::kFprop) {
          channel.fprop();
        } else {
          channel.dgrad();
        }
      }
    });
  });
}

using Launch = void (*)(const BatchNormProblem&, const BatchNormArgs&, const Context&);

BatchNormKernel batch_norm_row(const std::string& variant, Direction direction,
                               double gigabytes_per_second,
                               std::function<std::remove_pointer_t<Launch>> launch) {
  BatchNormKernel row;
  row.name = "batch_norm_" + variant + "_" + name_of(direction);
  row.op = "batch_norm";
  row.direction = direction;
  row.backend = Backend::kCpu;
  row.arch = variant == "reference" ? "portable" : variant;
  row.dtypes = kAllDTypes;
  row.layouts = kAllLayouts;
  row.supports = [](const BatchNormProblem&, const Device&) { return std::string(); };
  row.cost = [gigabytes_per_second](const BatchNormProblem& t, const Device& device) {
    return streaming_cost(t.bytes(), gigabytes_per_second, device);
  };
  row.launch = std::move(launch);
  return row;
}

}  // namespace

void add_cpu_batch_norm_rows(KernelTable& table) {
  for (const Direction direction : {Direction::kFprop, Direction::kDgrad}) {
    const bool fprop = direction == Direction::kFprop;
    const auto add = [&](const char* arch, double bandwidth, Launch launch) {
      table.batch_norm.push_back(batch_norm_row(arch, direction, bandwidth, launch));
      table.batch_norm.back().workspace = [](const BatchNormProblem& t, const Device&) {
        return BatchNormPlan(t).workspace();
      };
    };
#if defined(__x86_64__)
    add("avx512", kAvx512Bandwidth, fprop ? avx512::batch_norm_fprop : avx512::batch_norm_dgrad);
    add("avx2", kAvx2Bandwidth, fprop ? avx2::batch_norm_fprop : avx2::batch_norm_dgrad);
#endif
    add("portable", kPortableBandwidth,
        fprop ? portable::batch_norm_fprop : portable::batch_norm_dgrad);
    table.batch_norm.push_back(batch_norm_row(
        "reference", direction, kReferenceBandwidth,
        [direction](const BatchNormProblem& t, const BatchNormArgs& a, const Context& context) {
          launch_reference(t, a, context, direction);
        }));
  }
}

}  // namespace fastconv
