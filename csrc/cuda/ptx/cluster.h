// Clusters: blocks that run together and reach each other's shared memory. sm_90.
// PTX ISA, "barrier.cluster", "mapa", and the state space .shared::cluster.
//
// Another block's memory may be touched after the first cluster barrier (before, it may not have
// started) and until the last (after, it may have ended).
#pragma once

#include <type_traits>

#include "cuda/ptx/target.h"
#ifdef FASTCONV_EMULATOR
#include "emulator/barrier.h"
#endif

namespace fastconv {
namespace ptx {

__device__ inline uint32_t cluster_rank() {
#ifdef FASTCONV_EMULATOR
  return emulator::cluster_rank();
#else
  uint32_t rank = 0;
  FASTCONV_ASM_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

__device__ inline uint32_t cluster_size() {
#ifdef FASTCONV_EMULATOR
  return emulator::cluster_size();
#else
  uint32_t size = 0;
  FASTCONV_ASM_SM90("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#endif
}

// Every thread of the cluster arrives, then waits; whole warps together. What a thread wrote before
// it arrived is seen by all after the wait.
__device__ inline void cluster_arrive() {
#ifdef FASTCONV_EMULATOR
  emulator::cluster_arrive();
#else
  FASTCONV_ASM_SM90("barrier.cluster.arrive.release.aligned;" :: : "memory");
#endif
}
__device__ inline void cluster_wait() {
#ifdef FASTCONV_EMULATOR
  emulator::cluster_wait();
#else
  FASTCONV_ASM_SM90("barrier.cluster.wait.acquire.aligned;" :: : "memory");
#endif
}
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// The same for threads that have written nothing for each other but what fences of their own have
// published: a release would wait for every store to global memory that is under way.
__device__ inline void cluster_sync_relaxed() {
#ifdef FASTCONV_EMULATOR
  emulator::cluster_arrive();
#else
  FASTCONV_ASM_SM90("barrier.cluster.arrive.relaxed.aligned;" :: : "memory");
#endif
  cluster_wait();
}

// Where block `rank` of the cluster has what this block has at `address`.
__device__ inline uint32_t mapa(uint32_t address, uint32_t rank) {
#ifdef FASTCONV_EMULATOR
  return emulator::mapa(address, rank);
#else
  uint32_t there = 0;
  FASTCONV_ASM_SM90("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
#endif
}

// 4 bytes of any block of the cluster.
template <class T>
__device__ inline T load_cluster(uint32_t address) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, uint32_t>, "4 bytes");
#ifdef FASTCONV_EMULATOR
  T value;
  emulator::load_cluster(address, &value, sizeof(T));
  return value;
#else
  T value = 0;
  if constexpr (std::is_same_v<T, float>) {
    FASTCONV_ASM_SM90("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  } else {
    FASTCONV_ASM_SM90("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  }
  return value;
#endif
}
template <class T>
__device__ inline void store_cluster(uint32_t address, T value) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, uint32_t>, "4 bytes");
#ifdef FASTCONV_EMULATOR
  emulator::store_cluster(address, &value, sizeof(T));
#else
  if constexpr (std::is_same_v<T, float>) {
    FASTCONV_ASM_SM90("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
  } else {
    FASTCONV_ASM_SM90("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
  }
#endif
}

}  // namespace ptx
}  // namespace fastconv
