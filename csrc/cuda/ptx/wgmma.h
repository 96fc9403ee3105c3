// wgmma: a warpgroup (4 warps, the first a multiple of 4) multiplies A [64 x K] with B [K x N] and
// adds to float32 D [64 x N], asynchronously. sm_90a.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions". K = 16 for
// 16-bit elements, 8 for TF32.
//
// D: thread 32 w + l holds in register i row 16 w + l / 4 + 8 * (i / 2 % 2), column
// 8 * (i / 4) + 2 * (l % 4) + i % 2. A in registers: warp w has rows 16 w .. 16 w + 15, laid out as
// mma.sync's A. Matrices in shared memory are described by 64 bits, WgmmaMatrix.
//
// Use: write shared memory, fence_proxy_async() if by ordinary stores, barrier; wgmma_fence();
// wgmma() ...; wgmma_commit(); wgmma_wait<0>(); read D. Between issue and wait neither D, nor A's
// registers, nor the shared memory may be touched.
#pragma once

#include <type_traits>

#include "cuda/ptx/mma.h"
#include "cuda/ptx/target.h"
#ifdef FASTCONV_EMULATOR
#include "emulator/wgmma.h"
#else
#include "cuda/ptx/wgmma_asm.h"
#endif

namespace fastconv {
namespace ptx {

enum class WgmmaSwizzle : uint32_t { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };
enum class WgmmaMajor { kK, kMn };  // which dimension is contiguous: K, or A's M and B's N

// Where a matrix lies. With u = 16 bytes, W units a swizzled row (2, 4, 8 for 32, 64, 128 bytes)
// and r a row of A or a column of B, the address before the swizzle of
//   K-major,  no swizzle: unit j of r     start + r / 8 * stride + r % 8 * u + j * leading
//   K-major,  swizzled:   unit j of r     start + r / 8 * stride + r % 8 * W * u + j * u
//   MN-major, no swizzle: unit j of k     start + j * stride + k % 8 * u + k / 8 * leading
//   MN-major, swizzled:   unit j of k     start + j / W * leading + j % W * u + k % 8 * W * u +
//                                         k / 8 * stride
// MN-major is for 16-bit elements. The swizzle works on the address's own bits as TMA's does, so
// the tile's start is a multiple of 1024 (512, 256) and a step along K inside the swizzled row
// just adds its bytes to `start`.
struct WgmmaMatrix {
  uint32_t start;    // shared address, a multiple of 16
  uint32_t leading;  // bytes; all three below 2^18
  uint32_t stride;
  WgmmaSwizzle swizzle;
};
__device__ constexpr uint64_t encode(const WgmmaMatrix& m) {
  return uint64_t{(m.start & 0x3ffffu) >> 4} | uint64_t{(m.leading & 0x3ffffu) >> 4} << 16 |
         uint64_t{(m.stride & 0x3ffffu) >> 4} << 32 |
         uint64_t{static_cast<uint32_t>(m.swizzle)} << 62;
}
// The descriptor of a K-major tile with rows of 128 bytes under TMA's 128-byte swizzle: what every
// main loop uses. Groups of 8 rows follow each other.
__device__ constexpr uint64_t encode_rows_of_128(uint32_t start) {
  return encode({start, 16, 1024, WgmmaSwizzle::k128});
}

// Before the first wgmma and between any use of D's or A's registers and the next wgmma.
__device__ inline void wgmma_fence() {
#ifdef FASTCONV_EMULATOR
  emulator::wgmma_fence();
#else
  FASTCONV_ASM_SM90A("wgmma.fence.sync.aligned;" :: : "memory");
#endif
}

__device__ inline void wgmma_commit() {
#ifdef FASTCONV_EMULATOR
  emulator::wgmma_commit();
#else
  FASTCONV_ASM_SM90A("wgmma.commit_group.sync.aligned;" :: : "memory");
#endif
}

// Until at most kPending of the committed groups are under way.
template <int kPending>
__device__ inline void wgmma_wait() {
  static_assert(kPending >= 0 && kPending <= 7, "PTX's range");
#ifdef FASTCONV_EMULATOR
  emulator::wgmma_wait(kPending);
#else
  FASTCONV_ASM_SM90A("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Keeps the compiler from moving uses of D across here: it does not know that a wgmma writes D
// until the wait. Costs nothing.
template <int kCount>
__device__ inline void wgmma_fence_registers(float (&d)[kCount]) {
#ifndef FASTCONV_EMULATOR
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
#else
  static_cast<void>(d);
#endif
}

template <int N>
constexpr bool kIsWgmmaN =
    N == 8 || N == 16 || N == 32 || N == 64 || N == 96 || N == 128 || N == 192 || N == 256;

// d = a * b + (accumulate ? d : 0); T: __half, __nv_bfloat16 or Tf32.
template <class T, int N, WgmmaMajor kMajorA = WgmmaMajor::kK, WgmmaMajor kMajorB = WgmmaMajor::kK>
__device__ inline void wgmma(float (&d)[N / 2], uint64_t a_matrix, uint64_t b_matrix,
                             int accumulate) {
  static_assert(kIsMmaType<T> && kIsWgmmaN<N>, "what wgmma multiplies");
  constexpr int kMnMajorA = kMajorA == WgmmaMajor::kMn, kMnMajorB = kMajorB == WgmmaMajor::kMn;
  static_assert(!std::is_same_v<T, Tf32> || (!kMnMajorA && !kMnMajorB), "TF32 is K-major only");
#ifdef FASTCONV_EMULATOR
  emulator::wgmma({kMmaType<T>, N, kMnMajorA != 0, kMnMajorB != 0}, d, a_matrix, b_matrix,
                  accumulate != 0);
#else
  if constexpr (N == 8) {
    FASTCONV_WGMMA_SS_TYPES(8, 4, 5, 6, 7, 8)
  } else if constexpr (N == 16) {
    FASTCONV_WGMMA_SS_TYPES(16, 8, 9, 10, 11, 12)
  } else if constexpr (N == 32) {
    FASTCONV_WGMMA_SS_TYPES(32, 16, 17, 18, 19, 20)
  } else if constexpr (N == 64) {
    FASTCONV_WGMMA_SS_TYPES(64, 32, 33, 34, 35, 36)
  } else if constexpr (N == 96) {
    FASTCONV_WGMMA_SS_TYPES(96, 48, 49, 50, 51, 52)
  } else if constexpr (N == 128) {
    FASTCONV_WGMMA_SS_TYPES(128, 64, 65, 66, 67, 68)
  } else if constexpr (N == 192) {
    FASTCONV_WGMMA_SS_TYPES(192, 96, 97, 98, 99, 100)
  } else {
    FASTCONV_WGMMA_SS_TYPES(256, 128, 129, 130, 131, 132)
  }
#endif
}

// The same with A in registers.
template <class T, int N, WgmmaMajor kMajorB = WgmmaMajor::kK>
__device__ inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b_matrix,
                             int accumulate) {
  static_assert(kIsMmaType<T> && kIsWgmmaN<N>, "what wgmma multiplies");
  constexpr int kMnMajorB = kMajorB == WgmmaMajor::kMn;
  static_assert(!std::is_same_v<T, Tf32> || !kMnMajorB, "TF32 is K-major only");
#ifdef FASTCONV_EMULATOR
  emulator::wgmma({kMmaType<T>, N, false, kMnMajorB != 0}, d, a, b_matrix, accumulate != 0);
#else
  if constexpr (N == 8) {
    FASTCONV_WGMMA_RS_TYPES(8, 4, 5, 6, 7, 8, 9, 10)
  } else if constexpr (N == 16) {
    FASTCONV_WGMMA_RS_TYPES(16, 8, 9, 10, 11, 12, 13, 14)
  } else if constexpr (N == 32) {
    FASTCONV_WGMMA_RS_TYPES(32, 16, 17, 18, 19, 20, 21, 22)
  } else if constexpr (N == 64) {
    FASTCONV_WGMMA_RS_TYPES(64, 32, 33, 34, 35, 36, 37, 38)
  } else if constexpr (N == 96) {
    FASTCONV_WGMMA_RS_TYPES(96, 48, 49, 50, 51, 52, 53, 54)
  } else if constexpr (N == 128) {
    FASTCONV_WGMMA_RS_TYPES(128, 64, 65, 66, 67, 68, 69, 70)
  } else if constexpr (N == 192) {
    FASTCONV_WGMMA_RS_TYPES(192, 96, 97, 98, 99, 100, 101, 102)
  } else {
    FASTCONV_WGMMA_RS_TYPES(256, 128, 129, 130, 131, 132, 133, 134)
  }
#endif
}

}  // namespace ptx
}  // namespace fastconv
