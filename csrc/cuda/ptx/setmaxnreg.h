// setmaxnreg: the warps of a warpgroup, all four, give registers back to the block or take some.
// PTX ISA, "Miscellaneous Instructions: setmaxnreg". sm_90a.
//
// The block's registers are those it was launched with, so the kernel needs __launch_bounds__, and
// a request waits until others have given enough: of 384 threads, launched with 168 each, one
// warpgroup goes down to 24 and two go up to 240, or 40 and 232.
#pragma once

#include "cuda/ptx/target.h"
#ifdef FASTCONV_EMULATOR
#include "emulator/barrier.h"
#endif

namespace fastconv {
namespace ptx {

template <int kRegisters>
__device__ inline void setmaxnreg_dec() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "PTX's range");
#ifdef FASTCONV_EMULATOR
  emulator::setmaxnreg(kRegisters, false);
#else
  FASTCONV_ASM_SM90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ inline void setmaxnreg_inc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "PTX's range");
#ifdef FASTCONV_EMULATOR
  emulator::setmaxnreg(kRegisters, true);
#else
  FASTCONV_ASM_SM90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

}  // namespace ptx
}  // namespace fastconv
