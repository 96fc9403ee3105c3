// Barriers of some of a block's warps, and the election of a lane.
// PTX ISA, "bar, barrier", sm_70; "elect.sync", sm_90.
#pragma once

#include "cuda/ptx/target.h"
#ifdef FASTCONV_EMULATOR
#include "emulator/barrier.h"
#endif

namespace fastconv {
namespace ptx {

// Warps arrive, whole, until `threads` (a multiple of 32) have come: those that sync() wait for
// that, those that arrive() go on. `id` 1 to 15; __syncthreads() is 0.
__device__ inline void named_barrier_sync(int id, int threads) {
#ifdef FASTCONV_EMULATOR
  emulator::named_barrier_sync(id, threads);
#else
  FASTCONV_ASM_SM80("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

__device__ inline void named_barrier_arrive(int id, int threads) {
#ifdef FASTCONV_EMULATOR
  emulator::named_barrier_arrive(id, threads);
#else
  FASTCONV_ASM_SM80("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// True for one lane of the warp, which all execute together; the same one each time.
__device__ inline bool elect_one() {
#ifdef FASTCONV_EMULATOR
  return emulator::elect_one();
#else
  uint32_t elected = 0;
  FASTCONV_ASM_SM90(
      "{\n"
      ".reg .pred chosen;\n"
      "elect.sync _|chosen, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, chosen;\n"
      "}" : "=r"(elected) : : "memory");
  return elected != 0;
#endif
}

}  // namespace ptx
}  // namespace fastconv
