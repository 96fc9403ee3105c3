// The element types a kernel may be asked for, the memory layouts, and the two 16-bit formats as
// plain structs with conversions, so that kernels need neither torch nor CUDA to name them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTCONV_HOST_DEVICE __host__ __device__
#else
#define FASTCONV_HOST_DEVICE
#endif

namespace fastconv {

enum class DType : uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };
enum class Layout : uint8_t { kNCHW, kNHWC };  // of a filter: KCRS, KRSC

// Sets of the above, as bit masks: a kernel row lists what it takes.
using DTypeSet = uint32_t;
using LayoutSet = uint32_t;
constexpr DTypeSet bit(DType t) { return 1u << static_cast<unsigned>(t); }
constexpr LayoutSet bit(Layout l) { return 1u << static_cast<unsigned>(l); }
constexpr DTypeSet kAllDTypes =
    bit(DType::kFloat32) | bit(DType::kFloat64) | bit(DType::kFloat16) | bit(DType::kBFloat16);
constexpr LayoutSet kAllLayouts = bit(Layout::kNCHW) | bit(Layout::kNHWC);

constexpr int64_t size_of(DType t) {
  return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2;
}
// What a kernel accumulates in: float64 for float64, float32 for everything else.
constexpr DType accumulator_of(DType t) {
  return t == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}
constexpr const char* name_of(DType t) {
  return t == DType::kFloat32   ? "float32"
         : t == DType::kFloat64 ? "float64"
         : t == DType::kFloat16 ? "float16"
                                : "bfloat16";
}
constexpr const char* name_of(Layout l) { return l == Layout::kNCHW ? "NCHW" : "NHWC"; }

namespace detail {
inline uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
}  // namespace detail

// bfloat16: the upper half of a float32. Rounds to nearest even; NaN stays NaN.
struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  explicit BFloat16(float f) {
    const uint32_t u = detail::bits_of(f);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (u >> 16) | 0x40u;
    bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
  }
  operator float() const { return detail::float_of(static_cast<uint32_t>(bits) << 16); }
};

// IEEE binary16. Both conversions are branch-free selects on float32 arithmetic, so that a compiler
// can vectorise them without F16C; subnormals, infinities and NaN are exact.
struct Half {
  uint16_t bits;
  Half() = default;
  explicit Half(float f) {
    const uint32_t sign = detail::bits_of(f) & 0x80000000u;
    const uint32_t magnitude = detail::bits_of(f) ^ sign;
    // Normal results: rebias the exponent by -112 and round to nearest even at bit 13.
    const uint32_t odd = (magnitude >> 13) & 1u;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;
    // Results below 2^-14: adding 0.5 lines the 10 mantissa bits up with the float's lowest bits.
    const uint32_t subnormal = detail::bits_of(detail::float_of(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN : infinity
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x47800000u ? special : half;  // 65536 and above
    bits = static_cast<uint16_t>(half | (sign >> 16));
  }
  operator float() const {
    const uint32_t sign = (static_cast<uint32_t>(bits) & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    // 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal in one multiply.
    const float scaled = detail::float_of(magnitude << 13) * detail::float_of(239u << 23);
    const uint32_t special = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    const uint32_t value = magnitude >= 0x7c00u ? special : detail::bits_of(scaled);
    return detail::float_of(value | sign);
  }
};
static_assert(sizeof(Half) == 2 && sizeof(BFloat16) == 2, "16-bit formats must be 2 bytes");

// The type a kernel computes in for elements of type T.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename AccumulatorOf<T>::type;

// What the reference rows add up in: wider than the type itself, so that they can be the oracle.
template <class T>
struct SumOf {
  using type = double;
};
template <>
struct SumOf<double> {
  using type = long double;  // 64 bits of mantissa on x86-64
};
template <class T>
using Sum = typename SumOf<T>::type;

// Calls f(T{}) with the C++ type of `dtype`.
template <class F>
decltype(auto) dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat32:
      break;
  }
  return f(float{});
}

}  // namespace fastconv
