// ldmatrix and stmatrix: a warp loads or stores 1, 2 or 4 matrices of 8 x 8 16-bit elements.
// PTX ISA, "Warp-level matrix load / store instruction". ldmatrix: sm_75; stmatrix: sm_90.
//
// Lane 8 * m + r names the 16 bytes (aligned to 16) of row r of matrix m. Of matrix m, lane l holds
// in register m row l / 4, columns 2 * (l % 4) and the next; transposed: column l / 4, rows
// 2 * (l % 4) and the next.
#pragma once

#include "cuda/ptx/target.h"
#ifdef FASTCONV_EMULATOR
#include "emulator/mma.h"
#endif

namespace fastconv {
namespace ptx {

template <int kMatrices, bool kTransposed = false>
__device__ inline void ldmatrix(uint32_t (&to)[kMatrices], uint32_t row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "what ldmatrix loads");
#ifdef FASTCONV_EMULATOR
  emulator::ldmatrix(to, kMatrices, kTransposed, row);
#else
  if constexpr (kMatrices == 1 && !kTransposed) {
    FASTCONV_ASM_SM80(
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(to[0]) : "r"(row) : "memory");
  } else if constexpr (kMatrices == 1) {
    FASTCONV_ASM_SM80("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(
        to[0]) : "r"(row) : "memory");
  } else if constexpr (kMatrices == 2 && !kTransposed) {
    FASTCONV_ASM_SM80("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(to[0]),
                      "=r"(to[1]) : "r"(row) : "memory");
  } else if constexpr (kMatrices == 2) {
    FASTCONV_ASM_SM80(
        "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(to[0]),
        "=r"(to[1]) : "r"(row) : "memory");
  } else if constexpr (!kTransposed) {
    FASTCONV_ASM_SM80(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]),
        "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
  } else {
    FASTCONV_ASM_SM80(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]),
        "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
  }
#endif
}

template <int kMatrices, bool kTransposed = false>
__device__ inline void stmatrix(uint32_t row, const uint32_t (&from)[kMatrices]) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "what stmatrix stores");
#ifdef FASTCONV_EMULATOR
  emulator::stmatrix(row, kMatrices, kTransposed, from);
#else
  if constexpr (kMatrices == 1 && !kTransposed) {
    FASTCONV_ASM_SM90("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(row),
                      "r"(from[0]) : "memory");
  } else if constexpr (kMatrices == 1) {
    FASTCONV_ASM_SM90("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(row),
                      "r"(from[0]) : "memory");
  } else if constexpr (kMatrices == 2 && !kTransposed) {
    FASTCONV_ASM_SM90("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(row),
                      "r"(from[0]), "r"(from[1]) : "memory");
  } else if constexpr (kMatrices == 2) {
    FASTCONV_ASM_SM90("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row),
                      "r"(from[0]), "r"(from[1]) : "memory");
  } else if constexpr (!kTransposed) {
    FASTCONV_ASM_SM90("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                      "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]) : "memory");
  } else {
    FASTCONV_ASM_SM90(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
        "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]) : "memory");
  }
#endif
}

}  // namespace ptx
}  // namespace fastconv
