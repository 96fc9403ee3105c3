// cp.async: a thread copies 4, 8 or 16 bytes from global to shared memory while it goes on.
// PTX ISA, "Data Movement and Conversion Instructions: Non-bulk copy". sm_80.
//
// The copies a thread has issued since its last commit form a group; groups complete in order, and
// after wait<n>() all but the newest n of this thread have. Other threads see them after a barrier.
#pragma once

#include "cuda/ptx/target.h"
#ifdef FASTCONV_EMULATOR
#include "emulator/cp_async.h"
#endif

namespace fastconv {
namespace ptx {

// kBytes at shared address `to` (a multiple of kBytes) become the first `source_bytes` of `from`
// (aligned likewise) and zeros. 16 bytes go past L1, less can only go through it.
template <int kBytes>
__device__ inline void cp_async(uint32_t to, const void* from, int source_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async copies");
#ifdef FASTCONV_EMULATOR
  emulator::cp_async(to, from, kBytes, source_bytes);
#else
  if constexpr (kBytes == 16) {
    FASTCONV_ASM_SM80("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                      "r"(source_bytes) : "memory");
  } else {
    FASTCONV_ASM_SM80("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from),
                      "r"(source_bytes), "n"(kBytes) : "memory");
  }
#endif
}

// 16 bytes through L1, for what the threads of a block read more than once (im2col windows).
__device__ inline void cp_async_cached_16(uint32_t to, const void* from, int source_bytes = 16) {
#ifdef FASTCONV_EMULATOR
  emulator::cp_async(to, from, 16, source_bytes);
#else
  FASTCONV_ASM_SM80("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                    "r"(source_bytes) : "memory");
#endif
}

__device__ inline void cp_async_commit() {
#ifdef FASTCONV_EMULATOR
  emulator::cp_async_commit();
#else
  FASTCONV_ASM_SM80("cp.async.commit_group;" :: : "memory");
#endif
}

template <int kPending>
__device__ inline void cp_async_wait() {
  static_assert(kPending >= 0, "groups that may remain under way");
#ifdef FASTCONV_EMULATOR
  emulator::cp_async_wait(kPending);
#else
  FASTCONV_ASM_SM80("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Waits for committed and uncommitted copies alike.
__device__ inline void cp_async_wait_all() {
#ifdef FASTCONV_EMULATOR
  emulator::cp_async_wait_all();
#else
  FASTCONV_ASM_SM80("cp.async.wait_all;" :: : "memory");
#endif
}

// The thread arrives at the mbarrier once all its copies so far have landed. noinc: the barrier's
// count includes this arrival.
__device__ inline void cp_async_mbarrier_arrive_noinc(uint32_t barrier) {
#ifdef FASTCONV_EMULATOR
  emulator::cp_async_mbarrier_arrive_noinc(barrier);
#else
  FASTCONV_ASM_SM80("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

}  // namespace ptx
}  // namespace fastconv
