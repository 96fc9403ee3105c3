// Fences between the ways of reaching memory. PTX ISA, "membar / fence". sm_90.
#pragma once

#include "cuda/ptx/target.h"
#ifdef FASTCONV_EMULATOR
#include "emulator/mbarrier.h"
#endif

namespace fastconv {
namespace ptx {

// The thread's ordinary loads and stores of shared memory so far come before what TMA and wgmma do
// with it afterwards. Each thread that wrote executes it, then the barrier, then the copy or wgmma.
__device__ inline void fence_proxy_async() {
#ifdef FASTCONV_EMULATOR
  emulator::fence_proxy_async();
  emulator::publish_mbarriers();
#else
  FASTCONV_ASM_SM90("fence.proxy.async.shared::cta;" :: : "memory");
#endif
}

// The thread's mbarrier_init() so far come before uses by the cluster's blocks and by copies; a
// barrier of the threads concerned follows.
__device__ inline void fence_mbarrier_init() {
#ifdef FASTCONV_EMULATOR
  emulator::publish_mbarriers();
#else
  FASTCONV_ASM_SM90("fence.mbarrier_init.release.cluster;" :: : "memory");
#endif
}

}  // namespace ptx
}  // namespace fastconv
