// Vectors of FASTCONV_VECTOR_BYTES bytes, with GCC's vector extensions. Included once for each
// instruction set: see isa.h.

namespace fastconv::FASTCONV_ISA::conv2d {

#define FASTCONV_INLINE inline __attribute__((always_inline))

template <class Acc>
struct Simd;
template <>
struct Simd<float> {
  static constexpr int kLanes = FASTCONV_VECTOR_BYTES / 4;
  typedef float Vec __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  typedef uint16_t Short __attribute__((vector_size(FASTCONV_VECTOR_BYTES / 2)));
  typedef float Loose __attribute__((vector_size(FASTCONV_VECTOR_BYTES), aligned(4), may_alias));
  typedef uint16_t LooseShort
      __attribute__((vector_size(FASTCONV_VECTOR_BYTES / 2), aligned(2), may_alias));
};
template <>
struct Simd<double> {
  static constexpr int kLanes = FASTCONV_VECTOR_BYTES / 8;
  typedef double Vec __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(FASTCONV_VECTOR_BYTES)));
  typedef double Loose __attribute__((vector_size(FASTCONV_VECTOR_BYTES), aligned(8), may_alias));
};
template <class Acc>
using Vec = typename Simd<Acc>::Vec;
template <class Acc>
constexpr int kLanes = Simd<Acc>::kLanes;

using FloatBits = Simd<float>::Bits;

// Reads kLanes consecutive elements as a vector of the accumulator's type. The two 16-bit formats
// follow core/dtype.h, a vector at a time.
FASTCONV_INLINE Vec<float> load(const float* p) {
  return *reinterpret_cast<const Simd<float>::Loose*>(p);
}
FASTCONV_INLINE Vec<double> load(const double* p) {
  return *reinterpret_cast<const Simd<double>::Loose*>(p);
}
FASTCONV_INLINE FloatBits load_bits(const void* p) {
  return __builtin_convertvector(
      static_cast<Simd<float>::Short>(*static_cast<const Simd<float>::LooseShort*>(p)), FloatBits);
}
FASTCONV_INLINE Vec<float> load(const BFloat16* p) { return (Vec<float>)(load_bits(p) << 16); }
FASTCONV_INLINE Vec<float> load(const Half* p) {
  const FloatBits bits = load_bits(p);
  const FloatBits sign = (bits & 0x8000u) << 16;
  const FloatBits magnitude = bits & 0x7fffu;
  const Vec<float> scaled = (Vec<float>)(magnitude << 13) * 0x1p112f;
  const FloatBits special = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  return (Vec<float>)((magnitude >= 0x7c00u ? special : (FloatBits)scaled) | sign);
}

FASTCONV_INLINE void store(float* p, Vec<float> v) {
  *reinterpret_cast<Simd<float>::Loose*>(p) = v;
}
FASTCONV_INLINE void store(double* p, Vec<double> v) {
  *reinterpret_cast<Simd<double>::Loose*>(p) = v;
}
FASTCONV_INLINE void store_bits(void* p, FloatBits bits) {
  *static_cast<Simd<float>::LooseShort*>(p) = __builtin_convertvector(bits, Simd<float>::Short);
}
FASTCONV_INLINE void store(BFloat16* p, Vec<float> v) {
  const FloatBits u = (FloatBits)v;
  const FloatBits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  store_bits(p, (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}
FASTCONV_INLINE void store(Half* p, Vec<float> v) {
  const FloatBits u = (FloatBits)v;
  const FloatBits sign = u & 0x80000000u;
  const FloatBits magnitude = u ^ sign;
  const FloatBits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const FloatBits subnormal = (FloatBits)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  const FloatBits zero = {};
  const FloatBits special = magnitude > 0x7f800000u ? zero + 0x7e00u : zero + 0x7c00u;
  const FloatBits half = magnitude < 0x38800000u ? subnormal : normal;
  store_bits(p, (magnitude >= 0x47800000u ? special : half) | (sign >> 16));
}

// Copies n < kLanes elements in two moves that overlap, or one: no loop, no call.
template <int kBytes>
FASTCONV_INLINE void move_ends(void* dst, const void* src, int64_t bytes) {
  char head[kBytes], tail[kBytes];
  const char* end = static_cast<const char*>(src) + bytes - kBytes;
  __builtin_memcpy(head, src, kBytes);
  __builtin_memcpy(tail, end, kBytes);
  __builtin_memcpy(dst, head, kBytes);
  __builtin_memcpy(static_cast<char*>(dst) + bytes - kBytes, tail, kBytes);
}
template <class T>
FASTCONV_INLINE void copy_short(T* dst, const T* src, int64_t n) {
  constexpr int64_t kSize = sizeof(T), kMost = kSize * (kLanes<accumulator_t<T>> - 1);
  const int64_t bytes = n * kSize;
  if constexpr (kMost >= 32) {
    if (bytes >= 32) return move_ends<32>(dst, src, bytes);
  }
  if constexpr (kMost >= 16) {
    if (bytes >= 16) return move_ends<16>(dst, src, bytes);
  }
  if constexpr (kMost >= 8 && kSize < 8) {
    if (bytes >= 8) return move_ends<8>(dst, src, bytes);
  }
  if constexpr (kMost >= 4 && kSize < 4) {
    if (bytes >= 4) return move_ends<4>(dst, src, bytes);
  }
  if (n > 0) dst[0] = src[0];
}
template <class Dst, class Src>
FASTCONV_INLINE void copy_short(Dst* dst, const Src* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = Dst(static_cast<accumulator_t<Src>>(src[i]));
}

// The first n < kLanes elements; the rest of the vector is zero.
template <class Acc, class T>
FASTCONV_INLINE Vec<Acc> load_part(const T* p, int64_t n) {
  Acc lanes[kLanes<Acc>] = {};
  copy_short(lanes, p, n);
  return load(lanes);
}
template <class Acc, class T>
FASTCONV_INLINE void store_part(T* p, Vec<Acc> v, int64_t n) {
  T lanes[kLanes<Acc>];
  store(lanes, v);
  copy_short(p, lanes, n);
}

// Lanes chosen by constant indices from the 2 * kLanes of (a, b).
template <class Acc, int... I>
FASTCONV_INLINE Vec<Acc> shuffle(Vec<Acc> a, Vec<Acc> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, typename Simd<Acc>::Int{I...});
#endif
}
// a0 b0 a1 b1 ..., of the lower (kUpper: upper) halves of a and b.
template <class Acc, bool kUpper, int... I>
FASTCONV_INLINE Vec<Acc> interleave(Vec<Acc> a, Vec<Acc> b, std::integer_sequence<int, I...>) {
  constexpr int L = kLanes<Acc>;
  return shuffle<Acc, (I % 2) * L + I / 2 + (kUpper ? L / 2 : 0)...>(a, b);
}

// Transposes kLanes vectors: each stage of interleaving rotates one bit of the row number into the
// lane number, so log2(kLanes) stages exchange the two.
template <class Acc>
FASTCONV_INLINE void transpose(Vec<Acc>* rows) {
  constexpr int L = kLanes<Acc>;
  using Lanes = std::make_integer_sequence<int, L>;
#pragma GCC unroll 4
  for (int stage = 1; stage < L; stage *= 2) {
    Vec<Acc> next[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave<Acc, false>(rows[i], rows[i + L / 2], Lanes{});
      next[2 * i + 1] = interleave<Acc, true>(rows[i], rows[i + L / 2], Lanes{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

}  // namespace fastconv::FASTCONV_ISA::conv2d
