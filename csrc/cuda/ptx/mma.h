// mma.sync: a warp multiplies A [16 x K] with B [K x 8] and adds float32 C [16 x 8]. sm_80.
// PTX ISA, "Matrix multiply-accumulate operation using mma instruction". A is held by rows, B by
// columns. With g = lane / 4 and t = lane % 4, a lane holds
//   D, C        rows g (registers 0, 1) and g + 8 (2, 3), columns 2t and 2t + 1
//   16-bit A    two elements a register: rows g, g + 8 at columns 2t, 2t + 1; for K = 16 then the
//               same rows at columns 2t + 8, 2t + 9
//   16-bit B    column g, rows 2t, 2t + 1; for K = 16 then rows 2t + 8, 2t + 9
//   TF32 A, B   one element a register: A (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);
//               B (t, g), (t + 4, g)
#pragma once

#include <type_traits>

#include "cuda/ptx/target.h"
#ifdef FASTCONV_EMULATOR
#include "emulator/mma.h"
#endif

namespace fastconv {
namespace ptx {

// The element type of TF32 operands: float32 of which the tensor cores ignore the low 13 bits.
struct Tf32 {};

#ifdef FASTCONV_EMULATOR
template <class T>
constexpr emulator::MmaType kMmaType = std::is_same_v<T, Tf32>     ? emulator::MmaType::kTf32
                                       : std::is_same_v<T, __half> ? emulator::MmaType::kFloat16
                                                                   : emulator::MmaType::kBFloat16;
#endif

template <class T>
constexpr bool kIsMmaType =
    std::is_same_v<T, Tf32> || std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>;

// d = a * b + c, K = 16 for T __half and __nv_bfloat16. d may be c.
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    const float (&c)[4]) {
  static_assert(kIsMmaType<T> && !std::is_same_v<T, Tf32>, "K = 16 is for 16-bit elements");
#ifdef FASTCONV_EMULATOR
  emulator::mma(kMmaType<T>, 16, d, a, b, c);
#else
  if constexpr (std::is_same_v<T, __half>) {
    FASTCONV_ASM_SM80(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};" : "=f"(d[0]),
        "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
        "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    FASTCONV_ASM_SM80(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%10, %11, %12, %13};" : "=f"(d[0]),
        "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
        "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
#endif
}

// The same for K = 8 of 16-bit elements.
template <class T>
__device__ inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                                   const float (&c)[4]) {
  static_assert(kIsMmaType<T> && !std::is_same_v<T, Tf32>, "two registers of A are 16-bit ones");
#ifdef FASTCONV_EMULATOR
  emulator::mma(kMmaType<T>, 8, d, a, b, c);
#else
  if constexpr (std::is_same_v<T, __half>) {
    FASTCONV_ASM_SM80(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%7, %8, %9, %10};" : "=f"(d[0]),
        "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
  } else {
    FASTCONV_ASM_SM80(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%7, %8, %9, %10};" : "=f"(d[0]),
        "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
  }
#endif
}

// The same for K = 8 of TF32 elements.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2], const float (&c)[4]) {
#ifdef FASTCONV_EMULATOR
  emulator::mma(emulator::MmaType::kTf32, 8, d, a, b, c);
#else
  FASTCONV_ASM_SM80(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};" : "=f"(d[0]),
      "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
      "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#endif
}

// float32 rounded to TF32's 10 bits of mantissa, to nearest and ties away from zero, as bits.
__device__ inline uint32_t to_tf32(float x) {
#ifdef FASTCONV_EMULATOR
  return emulator::round_to_tf32(x);
#else
  uint32_t bits = 0;
  FASTCONV_ASM_SM80("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

}  // namespace ptx
}  // namespace fastconv
