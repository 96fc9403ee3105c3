// What a .cu file sees of CUDA when g++ compiles it with -DFASTCONV_EMULATOR: the language's names
// on top of the toolkit's own host headers. The work is done in emulator/*.cpp, compiled once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#undef __launch_bounds__
#undef __grid_constant__
#undef __cluster_dims__
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)

#define threadIdx (::fastconv::emulator::view().thread)
#define blockIdx (::fastconv::emulator::view().block)
#define blockDim (::fastconv::emulator::view().block_size)
#define gridDim (::fastconv::emulator::view().grid_size)

namespace fastconv {
namespace emulator {

struct LaunchShape {
  const char* name;
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster;
  bool overlap_previous;
};

// Runs `thread` once for every thread of the grid; returns when all have ended. Throws Fault for
// what a detector found, and what a thread threw.
void launch(const LaunchShape& shape, const std::function<void()>& thread);

struct View {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
const View& view();  // the running thread's

unsigned char* shared_memory();  // the running thread's block's
constexpr int64_t kSharedGap = 64;
void poison_gap(unsigned char* at, int64_t bytes);

void sync_threads();
int sync_threads_reduce(int predicate, int how);  // how: 0 count, 1 and, 2 or
void sync_warp(uint32_t mask);
// Value of lane `source` (taken modulo `width`'s segment by the callers below).
uint64_t shuffle(uint32_t mask, uint64_t value, int source, const char* what);
uint32_t ballot(uint32_t mask, int predicate, const char* what);

template <class T>
T shuffle_value(uint32_t mask, T value, int source, const char* what) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source, what);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
inline int lane() { return static_cast<int>(view().thread.x & 31u); }

}  // namespace emulator
}  // namespace fastconv

inline void __syncthreads() { fastconv::emulator::sync_threads(); }
inline int __syncthreads_count(int p) { return fastconv::emulator::sync_threads_reduce(p, 0); }
inline int __syncthreads_and(int p) { return fastconv::emulator::sync_threads_reduce(p, 1); }
inline int __syncthreads_or(int p) { return fastconv::emulator::sync_threads_reduce(p, 2); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { fastconv::emulator::sync_warp(mask); }

// A source outside the lane's segment of `width` lanes gives the lane its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int base = fastconv::emulator::lane() & ~(width - 1);
  return fastconv::emulator::shuffle_value(mask, value, base + (source & (width - 1)),
                                           "__shfl_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int me = fastconv::emulator::lane(), source = me - static_cast<int>(delta);
  const bool inside = source >= (me & ~(width - 1));
  return fastconv::emulator::shuffle_value(mask, value, inside ? source : me, "__shfl_up_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int me = fastconv::emulator::lane(), source = me + static_cast<int>(delta);
  const bool inside = source <= (me | (width - 1));
  return fastconv::emulator::shuffle_value(mask, value, inside ? source : me, "__shfl_down_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int me = fastconv::emulator::lane(), source = me ^ lanes;
  const bool inside = source <= (me | (width - 1));
  return fastconv::emulator::shuffle_value(mask, value, inside ? source : me, "__shfl_xor_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return fastconv::emulator::ballot(mask, predicate, "__ballot_sync");
}
inline int __any_sync(unsigned mask, int predicate) {
  return fastconv::emulator::ballot(mask, predicate, "__any_sync") != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return fastconv::emulator::ballot(mask, predicate == 0, "__all_sync") == 0;
}

inline void __threadfence() {}        // one OS thread runs every block
inline void __threadfence_block() {}  // likewise

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

// Integers only: a floating-point atomic would make the order of a sum a matter of luck.
template <class T>
T atomicAdd(T* at, T value) {
  static_assert(std::is_integral<T>::value, "no floating-point atomics");
  const T before = *at;
  *at = static_cast<T>(before + value);
  return before;
}
