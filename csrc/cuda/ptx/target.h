// What the instructions of this folder are made of: assembly where the target has the instruction,
// a trap where it has not, the emulator's meaning where FASTCONV_EMULATOR is defined.
//
// A file that uses an sm_90 instruction thus compiles for sm_80 too, and a kernel that reaches it
// there stops with an error instead of computing something else. Choosing rows by architecture
// keeps that from happening.
#pragma once

#ifdef FASTCONV_EMULATOR
#include "emulator/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define FASTCONV_ASM_SM80(...) asm volatile(__VA_ARGS__)
#else
#define FASTCONV_ASM_SM80(...) __trap()
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FASTCONV_ASM_SM90(...) asm volatile(__VA_ARGS__)
#else
#define FASTCONV_ASM_SM90(...) __trap()
#endif
// Only the target sm_90a has these: compute_90 PTX, which newer cards run, must do without.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTCONV_ASM_SM90A(...) asm volatile(__VA_ARGS__)
#else
#define FASTCONV_ASM_SM90A(...) __trap()
#endif

namespace fastconv {
#ifdef FASTCONV_EMULATOR
namespace emulator {
uint32_t shared_address(const void* pointer);  // see scheduler.h
void fence_proxy_async();
}  // namespace emulator
#endif
namespace ptx {

// Shared memory as the instructions below address it. An address of the running block is also
// valid where one of the cluster is asked for; see mapa() for those of the other blocks.
__device__ inline uint32_t shared_address(const void* pointer) {
#ifdef FASTCONV_EMULATOR
  return emulator::shared_address(pointer);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

}  // namespace ptx
}  // namespace fastconv
