// Elements as a GPU holds them: CUDA's own 16-bit types, whose conversions are single instructions,
// and packs of them that move 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"

namespace fastconv {
namespace cuda {

// core's Half is CUDA's __half, bit for bit; likewise BFloat16.
template <class T>
struct ElementOf {
  using type = T;
};
template <>
struct ElementOf<Half> {
  using type = __half;
};
template <>
struct ElementOf<BFloat16> {
  using type = __nv_bfloat16;
};

// Calls f(T{}) with the CUDA type of `dtype`.
template <class F>
void dispatch_element(DType dtype, F&& f) {
  dispatch_dtype(dtype, [&](auto type) { f(typename ElementOf<decltype(type)>::type{}); });
}

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even, once.
template <class T>
__device__ inline T narrow(accumulator_t<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

constexpr int kPackBytes = 16;  // the widest load and store a thread has on sm_80 and sm_90
template <class T>
constexpr int kPackSize = kPackBytes / static_cast<int>(sizeof(T));

// kSize neighbours, loaded and stored in as few instructions as their alignment allows.
template <class T, int kSize>
struct alignas(kSize * sizeof(T) < kPackBytes ? kSize * sizeof(T) : kPackBytes) Pack {
  T at[kSize];
};

template <class T, int kSize>
__device__ inline Pack<T, kSize> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, kSize>*>(from);
}
template <class T, int kSize>
__device__ inline void store_pack(T* to, const Pack<T, kSize>& pack) {
  *reinterpret_cast<Pack<T, kSize>*>(to) = pack;
}

inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// {quotient, remainder}. A 64-bit division is a subroutine of some 70 instructions on a GPU, a
// 32-bit one about 20, and nearly every index fits 32 bits.
struct Division {
  int64_t quotient;
  int remainder;
};
__device__ inline Division divide(int64_t x, int by) {
  if (static_cast<uint64_t>(x) >> 32 == 0) {
    const uint32_t small = static_cast<uint32_t>(x), divisor = static_cast<uint32_t>(by);
    return {static_cast<int64_t>(small / divisor), static_cast<int>(small % divisor)};
  }
  return {x / by, static_cast<int>(x % by)};
}

}  // namespace cuda
}  // namespace fastconv
