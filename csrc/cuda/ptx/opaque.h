// A value of which the compiler knows nothing.
#pragma once

#include "cuda/ptx/target.h"

namespace fastconv {
namespace ptx {

// x. What is computed from it stays behind it: addresses that follow from a thread's number alone
// would be computed before a persistent kernel's loop over tiles and kept in registers throughout.
__device__ inline int opaque(int x) {
#ifndef FASTCONV_EMULATOR
  asm volatile("" : "+r"(x));
#endif
  return x;
}

}  // namespace ptx
}  // namespace fastconv
