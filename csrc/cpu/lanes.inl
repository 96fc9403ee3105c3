// Vectors of one instruction set for memory-bound kernels: loads and stores that convert the
// 16-bit types, whole or only the first n lanes, and the shuffles of stride 2. Included by other
// .inl files, once for each instruction set of a .cpp; the .cpp includes <immintrin.h> on x86-64.
//
// A lane is an accumulator (float or double); positions are kept in integers as wide as a lane, so
// that one comparison's mask selects both.

// Vectors pass between functions only where the call is inlined away, so no ABI is involved.
#ifndef FASTCONV_INLINE
#define FASTCONV_INLINE inline __attribute__((always_inline))
#define FASTCONV_INLINE_LAMBDA __attribute__((always_inline))
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#endif

namespace fastconv {
namespace FASTCONV_ISA {

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  typedef uint32_t U __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  typedef uint16_t H __attribute__((vector_size(FASTCONV_VECTOR_BYTES / 2)));
  using Int = int32_t;
  static constexpr int64_t kCount = FASTCONV_VECTOR_BYTES / 4;
};
template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  using Int = int64_t;
  static constexpr int64_t kCount = FASTCONV_VECTOR_BYTES / 8;
};
template <class A>
using Vec = typename Lanes<A>::V;
template <class A>
using IntVec = typename Lanes<A>::I;

template <class A>
FASTCONV_INLINE Vec<A> broadcast(A value) {
  return Vec<A>{} + value;
}
template <class A>
FASTCONV_INLINE IntVec<A> broadcast_int(int64_t value) {
  return IntVec<A>{} + static_cast<typename Lanes<A>::Int>(value);
}
// first, first + step, first + 2 * step, ...
template <class A>
FASTCONV_INLINE IntVec<A> ramp(int64_t first, int64_t step) {
  IntVec<A> v{};
  for (int64_t i = 0; i < Lanes<A>::kCount; ++i) {
    v[i] = static_cast<typename Lanes<A>::Int>(first + i * step);
  }
  return v;
}

// ---- 16-bit types --------------------------------------------------------------------------

FASTCONV_INLINE Vec<float> widen(Lanes<float>::H h, BFloat16) {
  typedef Lanes<float>::U U;
  return (Vec<float>)(__builtin_convertvector(h, U) << 16);
}
// The same rounding as BFloat16(float).
FASTCONV_INLINE Lanes<float>::H narrow(Vec<float> v, BFloat16) {
  typedef Lanes<float>::U U;
  typedef Lanes<float>::H H;
  const U u = (U)v;
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v != v ? (u >> 16) | 0x40u : rounded, H);
}

#if FASTCONV_VECTOR_BYTES == 64
// The maskz forms with a full mask: GCC 12 warns of its own header in the plain ones.
FASTCONV_INLINE Vec<float> widen(Lanes<float>::H h, Half) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
}
FASTCONV_INLINE Lanes<float>::H narrow(Vec<float> v, Half) {
  return (Lanes<float>::H)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif FASTCONV_VECTOR_BYTES == 32
FASTCONV_INLINE Vec<float> widen(Lanes<float>::H h, Half) {
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
}
FASTCONV_INLINE Lanes<float>::H narrow(Vec<float> v, Half) {
  return (Lanes<float>::H)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
// Half's own conversions, a vector at a time (dtype.h explains the constants).
FASTCONV_INLINE Vec<float> widen(Lanes<float>::H h, Half) {
  typedef Lanes<float>::U U;
  const U u = __builtin_convertvector(h, U), magnitude = u & 0x7fffu;
  const U scaled = (U)((Vec<float>)(magnitude << 13) * broadcast<float>(0x1p112f));
  const U special = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  return (Vec<float>)((magnitude >= 0x7c00u ? special : scaled) | ((u & 0x8000u) << 16));
}
FASTCONV_INLINE Lanes<float>::H narrow(Vec<float> v, Half) {
  typedef Lanes<float>::U U;
  typedef Lanes<float>::H H;
  const U sign = (U)v & 0x80000000u, magnitude = (U)v ^ sign;
  const U normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U subnormal = (U)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  const U special = magnitude > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
  U half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? special : half;
  return __builtin_convertvector(half | (sign >> 16), H);
}
#endif

// ---- Whole vectors -------------------------------------------------------------------------

template <class T>
FASTCONV_INLINE Vec<accumulator_t<T>> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    Lanes<float>::H h;
    __builtin_memcpy(&h, p, sizeof(h));
    return widen(h, T());
  } else {
    Vec<T> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
}
template <class T>
FASTCONV_INLINE void store(T* p, Vec<accumulator_t<T>> v) {
  if constexpr (sizeof(T) == 2) {
    const Lanes<float>::H h = narrow(v, T());
    __builtin_memcpy(p, &h, sizeof(h));
  } else {
    __builtin_memcpy(p, &v, sizeof(v));
  }
}
template <class A>
FASTCONV_INLINE IntVec<A> load_int(const typename Lanes<A>::Int* p) {
  IntVec<A> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class A>
FASTCONV_INLINE void store_int(typename Lanes<A>::Int* p, IntVec<A> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// ---- The first n lanes, 0 <= n <= kCount ---------------------------------------------------
// Nothing past p[n - 1] is touched. Masked moves where the instruction set has them, else
// a small array, at the end of a row only.

#if FASTCONV_VECTOR_BYTES == 64
template <class T>
FASTCONV_INLINE Vec<accumulator_t<T>> load_first(const T* p, int64_t n,
                                                 Vec<accumulator_t<T>> fill) {
  const uint32_t mask = (1u << n) - 1u;
  if constexpr (sizeof(T) == 8) {
    return (Vec<T>)_mm512_mask_loadu_pd((__m512d)fill, static_cast<__mmask8>(mask), p);
  } else if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_mask_loadu_ps((__m512)fill, static_cast<__mmask16>(mask), p);
  } else {
    const __m256i h = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p);
    return (Vec<float>)_mm512_mask_mov_ps((__m512)fill, static_cast<__mmask16>(mask),
                                          (__m512)widen((Lanes<float>::H)h, T()));
  }
}
template <class T>
FASTCONV_INLINE void store_first(T* p, Vec<accumulator_t<T>> v, int64_t n) {
  const uint32_t mask = (1u << n) - 1u;
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), (__m512d)v);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v);
  } else {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), (__m256i)narrow(v, T()));
  }
}
#else
#if FASTCONV_VECTOR_BYTES == 32
// AVX2 masks 32-bit and 64-bit moves: a lane is moved where its index is below n.
template <class T>
FASTCONV_INLINE __m256i first_lanes(int64_t n) {
  return (__m256i)(ramp<T>(0, 1) < broadcast_int<T>(n));
}
#endif
template <class T>
FASTCONV_INLINE Vec<accumulator_t<T>> load_first(const T* p, int64_t n,
                                                 Vec<accumulator_t<T>> fill) {
  using A = accumulator_t<T>;
#if FASTCONV_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    const __m256i mask = first_lanes<T>(n);
    return (IntVec<T>)mask ? (Vec<T>)_mm256_maskload_ps(p, mask) : fill;
  } else if constexpr (sizeof(T) == 8) {
    const __m256i mask = first_lanes<T>(n);
    return (IntVec<T>)mask ? (Vec<T>)_mm256_maskload_pd(p, mask) : fill;
  }
#endif
  A lanes[Lanes<A>::kCount];
  __builtin_memcpy(lanes, &fill, sizeof(lanes));
  for (int64_t i = 0; i < n; ++i) lanes[i] = A(p[i]);
  return load(lanes);
}
template <class T>
FASTCONV_INLINE void store_first(T* p, Vec<accumulator_t<T>> v, int64_t n) {
  using A = accumulator_t<T>;
#if FASTCONV_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) return _mm256_maskstore_ps(p, first_lanes<T>(n), (__m256)v);
  if constexpr (sizeof(T) == 8) return _mm256_maskstore_pd(p, first_lanes<T>(n), (__m256d)v);
#endif
  A lanes[Lanes<A>::kCount];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = T(lanes[i]);
}
#endif

// Loads and stores of a loop's step: whole vectors while n >= kCount, the rest masked.
template <class T>
FASTCONV_INLINE Vec<accumulator_t<T>> load_upto(const T* p, int64_t n, Vec<accumulator_t<T>> fill) {
  return n >= Lanes<accumulator_t<T>>::kCount ? load(p) : load_first(p, n > 0 ? n : 0, fill);
}
template <class T>
FASTCONV_INLINE void store_upto(T* p, Vec<accumulator_t<T>> v, int64_t n) {
  if (n >= Lanes<accumulator_t<T>>::kCount) {
    store(p, v);
  } else if (n > 0) {
    store_first(p, v, n);
  }
}

// ---- Sums ----------------------------------------------------------------------------------

FASTCONV_INLINE double add_lanes(Vec<double> v) {
  double lanes[Lanes<double>::kCount];
  store(lanes, v);
  for (int64_t n = Lanes<double>::kCount / 2; n > 0; n /= 2) {
    for (int64_t l = 0; l < n; ++l) lanes[l] += lanes[l + n];
  }
  return lanes[0];
}

// A vector's lanes in float64: two vectors of them for float, the same one for double. Sums over a
// whole plane or channel are kept so: they have no more error than their last rounding, and are
// still read faster than memory delivers.
template <class A>
struct Wide {
  static constexpr int kParts = sizeof(double) / sizeof(A);
  typedef A Part __attribute__((vector_size(FASTCONV_VECTOR_BYTES / kParts)));
  Vec<double> part[kParts]{};

  Wide() = default;
  FASTCONV_INLINE explicit Wide(Vec<A> v) {
    Part narrow[kParts];
    __builtin_memcpy(narrow, &v, sizeof(v));
    for (int i = 0; i < kParts; ++i) part[i] = __builtin_convertvector(narrow[i], Vec<double>);
  }
  FASTCONV_INLINE Vec<A> rounded() const {
    Part narrow[kParts];
    for (int i = 0; i < kParts; ++i) narrow[i] = __builtin_convertvector(part[i], Part);
    Vec<A> v;
    __builtin_memcpy(&v, narrow, sizeof(v));
    return v;
  }
  FASTCONV_INLINE double over_lanes() const {
    return add_lanes(kParts == 1 ? part[0] : part[0] + part[kParts - 1]);
  }
  FASTCONV_INLINE Wide& operator+=(const Wide& other) {
    for (int i = 0; i < kParts; ++i) part[i] += other.part[i];
    return *this;
  }
  FASTCONV_INLINE Wide& operator-=(const Wide& other) {
    for (int i = 0; i < kParts; ++i) part[i] -= other.part[i];
    return *this;
  }
  FASTCONV_INLINE Wide& operator*=(const Wide& other) {
    for (int i = 0; i < kParts; ++i) part[i] *= other.part[i];
    return *this;
  }
};
template <class A>
FASTCONV_INLINE Wide<A> operator+(Wide<A> a, const Wide<A>& b) {
  return a += b;
}
template <class A>
FASTCONV_INLINE Wide<A> operator-(Wide<A> a, const Wide<A>& b) {
  return a -= b;
}
template <class A>
FASTCONV_INLINE Wide<A> operator*(Wide<A> a, const Wide<A>& b) {
  return a *= b;
}

// ---- Stride 2 ------------------------------------------------------------------------------

// The even and the odd elements of a followed by b.
template <class A>
FASTCONV_INLINE void deinterleave(Vec<A> a, Vec<A> b, Vec<A>& even, Vec<A>& odd) {
#if defined(__clang__)
  constexpr int64_t L = Lanes<A>::kCount;
  for (int64_t i = 0; i < L; ++i) {
    even[i] = 2 * i < L ? a[2 * i] : b[2 * i - L];
    odd[i] = 2 * i < L ? a[2 * i + 1] : b[2 * i + 1 - L];
  }
#else
  even = __builtin_shuffle(a, b, ramp<A>(0, 2));
  odd = __builtin_shuffle(a, b, ramp<A>(1, 2));
#endif
}

// The inverse: a[0], b[0], a[1], b[1], ... in `first` and then `second`.
template <class A>
FASTCONV_INLINE void interleave(Vec<A> a, Vec<A> b, Vec<A>& first, Vec<A>& second) {
  constexpr int64_t L = Lanes<A>::kCount;
#if defined(__clang__)
  for (int64_t i = 0; i < L; ++i) {
    first[i] = i % 2 ? b[i / 2] : a[i / 2];
    second[i] = i % 2 ? b[L / 2 + i / 2] : a[L / 2 + i / 2];
  }
#else
  IntVec<A> low{};
  for (int64_t i = 0; i < L; ++i) {
    low[i] = static_cast<typename Lanes<A>::Int>(i / 2 + (i % 2 ? L : 0));
  }
  first = __builtin_shuffle(a, b, low);
  second = __builtin_shuffle(a, b, low + static_cast<typename Lanes<A>::Int>(L / 2));
#endif
}

}  // namespace FASTCONV_ISA
}  // namespace fastconv
