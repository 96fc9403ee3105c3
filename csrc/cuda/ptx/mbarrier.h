// mbarrier: a barrier in 8 bytes of shared memory that counts arrivals and bytes.
// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier". sm_90 here.
//
// A phase completes when as many arrivals as mbarrier_init() said have come and as many bytes have
// landed as were announced by expect_tx; the next then begins. Phases alternate in parity, the
// first has 0: wait(parity) returns when the phase under way has the other parity, so wait(1) on a
// fresh barrier returns at once.
//
// After init: fence_mbarrier_init(), then __syncthreads() or a cluster barrier, before any other
// thread or copy uses it.
#pragma once

#include "cuda/ptx/target.h"
#ifdef FASTCONV_EMULATOR
#include "emulator/mbarrier.h"
#endif

namespace fastconv {
namespace ptx {

constexpr int64_t kMbarrierBytes = 8;  // and their alignment

// The barriers below lie in the running block, unless said otherwise. `arrivals`: 1 to 2^20 - 1.
__device__ inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
#ifdef FASTCONV_EMULATOR
  emulator::mbarrier_init(barrier, arrivals);
#else
  FASTCONV_ASM_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier),
                    "r"(arrivals) : "memory");
#endif
}

// Its bytes may be used for something else afterwards.
__device__ inline void mbarrier_inval(uint32_t barrier) {
#ifdef FASTCONV_EMULATOR
  emulator::mbarrier_inval(barrier);
#else
  FASTCONV_ASM_SM90("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

// Releases what the thread has written to the threads of its block.
__device__ inline void mbarrier_arrive(uint32_t barrier) {
#ifdef FASTCONV_EMULATOR
  emulator::mbarrier_arrive(barrier);
#else
  FASTCONV_ASM_SM90(
      "mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// `barrier` in any block of the cluster, by mapa(). Enough to hand back memory that wgmma or loads
// have read; what this thread stored for the other block needs the release below.
__device__ inline void mbarrier_arrive_remote(uint32_t barrier) {
#ifdef FASTCONV_EMULATOR
  emulator::mbarrier_arrive_remote(barrier);
#else
  FASTCONV_ASM_SM90("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// The same, releasing the thread's stores to the cluster, for mbarrier_wait_cluster(). ptxas 13.0
// makes a MEMBAR.ALL.GPU of it: not for main loops.
__device__ inline void mbarrier_arrive_remote_release(uint32_t barrier) {
#ifdef FASTCONV_EMULATOR
  emulator::mbarrier_arrive_remote(barrier);
#else
  FASTCONV_ASM_SM90(
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// Announces bytes that copies will bring in this phase; no arrival.
__device__ inline void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) {
#ifdef FASTCONV_EMULATOR
  emulator::mbarrier_expect_tx(barrier, bytes);
#else
  FASTCONV_ASM_SM90("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier),
                    "r"(bytes) : "memory");
#endif
}

// Announces bytes, then arrives.
__device__ inline void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
#ifdef FASTCONV_EMULATOR
  emulator::mbarrier_arrive_expect_tx(barrier, bytes);
#else
  FASTCONV_ASM_SM90(
      "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
      "r"(bytes) : "memory");
#endif
}

// Whether the phase of `parity` has completed. Hardware gives up after a while and answers false;
// the emulator, where only a thread that stops lets copies land, answers when it has.
__device__ inline bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
#ifdef FASTCONV_EMULATOR
  emulator::mbarrier_wait(barrier, parity);
  return true;
#else
  uint32_t done = 0;
  FASTCONV_ASM_SM90(
      "{\n"
      ".reg .pred complete;\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 complete, [%1], %2;\n"
      "selp.b32 %0, 1, 0, complete;\n"
      "}" : "=r"(done) : "r"(barrier),
      "r"(parity) : "memory");
  return done != 0;
#endif
}

__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// The same where other blocks' threads have arrived by mbarrier_arrive_remote_release(): acquires
// from the cluster, which empties L1 (CCTL.IVALL).
__device__ inline void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
#ifdef FASTCONV_EMULATOR
  emulator::mbarrier_wait(barrier, parity);
#else
  uint32_t done = 0;
  do {
    FASTCONV_ASM_SM90(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], %2;\n"
        "selp.b32 %0, 1, 0, complete;\n"
        "}" : "=r"(done) : "r"(barrier),
        "r"(parity) : "memory");
  } while (done == 0);
#endif
}

}  // namespace ptx
}  // namespace fastconv
