// TMA: one thread has boxes of a tensor copied between global and shared memory. sm_90.
// PTX ISA, "cp.async.bulk", "cp.async.bulk.tensor", "Tensors". The map is made on the host
// (cuda/tensor_map.h) and reaches the kernel as a `const __grid_constant__ CUtensorMap` parameter.
//
// A tiled box lies in shared memory with its innermost dimension contiguous, outermost last; an
// im2col box as pixels of channels. Elements outside the tensor are zeros (or NaNs where the map
// says so) when loaded and are not stored. A swizzle of 2^k * 16 bytes (k = 1, 2, 3) exchanges the
// 16-byte units of the final shared address: bits 4 .. 3 + k ^= bits 7 .. 6 + k. Shared addresses
// are multiples of 128, under a swizzle of 32, 64, 128 bytes of 256, 512, 1024.
//
// Loads count their whole box, outside parts included, as bytes on an mbarrier that lies in the
// same block as the destination. Stores are committed to groups of the thread and waited for.
#pragma once

#include <cuda.h>  // CUtensorMap; nothing of the driver is linked

#include "cuda/ptx/target.h"
#ifdef FASTCONV_EMULATOR
#include "emulator/tma.h"
#endif

namespace fastconv {
namespace ptx {

__device__ inline void tma_prefetch_map(const CUtensorMap* map) {
#ifdef FASTCONV_EMULATOR
  emulator::tma_prefetch_map(map);
#else
  FASTCONV_ASM_SM90("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// The box whose first element is at coordinates `at`, innermost dimension first; they may be
// negative.
template <int kRank>
__device__ inline void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                const int (&at)[kRank]) {
  static_assert(kRank >= 2 && kRank <= 5, "ranks of a tiled map");
#ifdef FASTCONV_EMULATOR
  emulator::tma_load(to, map, barrier, kRank, at);
#else
  if constexpr (kRank == 2) {
    FASTCONV_ASM_SM90(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(at[0]), "r"(at[1]) : "memory");
  } else if constexpr (kRank == 3) {
    FASTCONV_ASM_SM90(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory");
  } else if constexpr (kRank == 4) {
    FASTCONV_ASM_SM90(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory");
  } else {
    FASTCONV_ASM_SM90(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
        "r"(at[4]) : "memory");
  }
#endif
}

// The same into each block of the cluster whose bit is set in `blocks`, at the offset that `to`
// has in this one, counted on the mbarrier at the offset that `barrier` has in this one. sm_90a:
// elsewhere PTX warns that it will be slow.
template <int kRank>
__device__ inline void tma_load_multicast(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                          uint16_t blocks, const int (&at)[kRank]) {
  static_assert(kRank >= 2 && kRank <= 5, "ranks of a tiled map");
#ifdef FASTCONV_EMULATOR
  emulator::tma_load_multicast(to, map, barrier, blocks, kRank, at);
#else
  if constexpr (kRank == 2) {
    FASTCONV_ASM_SM90A(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
        "l"(map), "r"(barrier), "h"(blocks), "r"(at[0]), "r"(at[1]) : "memory");
  } else if constexpr (kRank == 3) {
    FASTCONV_ASM_SM90A(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(to),
        "l"(map), "r"(barrier), "h"(blocks), "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory");
  } else if constexpr (kRank == 4) {
    FASTCONV_ASM_SM90A(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(to),
        "l"(map), "r"(barrier), "h"(blocks), "r"(at[0]), "r"(at[1]), "r"(at[2]),
        "r"(at[3]) : "memory");
  } else {
    FASTCONV_ASM_SM90A(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(to),
        "l"(map), "r"(barrier), "h"(blocks), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
        "r"(at[4]) : "memory");
  }
#endif
}

// pixelsPerColumn pixels of channelsPerPixel channels of an im2col map of (C, W, H, N), from
// channel c of pixel (n, h, w) of the map's bounding box on: along W in steps of the map's element
// strides, then H, then N. Each pixel is read at a distance of (offset_w, offset_h), 0 to 255: the
// filter tap's s and r times the dilation.
struct Im2colPosition {
  int c, w, h, n;
  uint16_t offset_w, offset_h;
};
__device__ inline void tma_load_im2col(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                       const Im2colPosition& at) {
#ifdef FASTCONV_EMULATOR
  const int position[4] = {at.c, at.w, at.h, at.n};
  const uint16_t offsets[2] = {at.offset_w, at.offset_h};
  emulator::tma_load_im2col(to, map, barrier, position, offsets);
#else
  FASTCONV_ASM_SM90(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(to),
      "l"(map), "r"(barrier), "r"(at.c), "r"(at.w), "r"(at.h), "r"(at.n), "h"(at.offset_w),
      "h"(at.offset_h) : "memory");
#endif
}
__device__ inline void tma_load_im2col_multicast(uint32_t to, const CUtensorMap* map,
                                                 uint32_t barrier, uint16_t blocks,
                                                 const Im2colPosition& at) {
#ifdef FASTCONV_EMULATOR
  const int position[4] = {at.c, at.w, at.h, at.n};
  const uint16_t offsets[2] = {at.offset_w, at.offset_h};
  emulator::tma_load_im2col_multicast(to, map, barrier, blocks, position, offsets);
#else
  FASTCONV_ASM_SM90A(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8}, %9;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(at.c), "r"(at.w), "r"(at.h), "r"(at.n), "h"(at.offset_w),
      "h"(at.offset_h), "h"(blocks) : "memory");
#endif
}

// `bytes` that need no map; it and both addresses are multiples of 16.
__device__ inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
#ifdef FASTCONV_EMULATOR
  emulator::bulk_load(to, from, bytes, barrier);
#else
  FASTCONV_ASM_SM90(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier) : "memory");
#endif
}

// The box at `at` of a tiled map from shared memory, which whoever wrote it has fenced
// (fence_proxy_async) and a barrier has followed.
template <int kRank>
__device__ inline void tma_store(const CUtensorMap* map, uint32_t from, const int (&at)[kRank]) {
  static_assert(kRank >= 2 && kRank <= 5, "ranks of a tiled map");
#ifdef FASTCONV_EMULATOR
  emulator::tma_store(map, from, kRank, at);
#else
  if constexpr (kRank == 2) {
    FASTCONV_ASM_SM90(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
        "r"(from), "r"(at[0]), "r"(at[1]) : "memory");
  } else if constexpr (kRank == 3) {
    FASTCONV_ASM_SM90(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
            map),
        "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory");
  } else if constexpr (kRank == 4) {
    FASTCONV_ASM_SM90(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
            map),
        "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory");
  } else {
    FASTCONV_ASM_SM90(
        "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::
            "l"(map),
        "r"(from), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]) : "memory");
  }
#endif
}

__device__ inline void tma_store_commit() {
#ifdef FASTCONV_EMULATOR
  emulator::tma_store_commit();
#else
  FASTCONV_ASM_SM90("cp.async.bulk.commit_group;" :: : "memory");
#endif
}

// Until at most kPending of the thread's groups still read shared memory. The thread that stored
// waits for 0 before it overwrites the memory, and before it ends.
template <int kPending>
__device__ inline void tma_store_wait_read() {
  static_assert(kPending >= 0, "groups that may remain under way");
#ifdef FASTCONV_EMULATOR
  emulator::tma_store_wait(kPending);
#else
  FASTCONV_ASM_SM90("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}
// Until at most kPending of the thread's groups have not yet written global memory.
template <int kPending>
__device__ inline void tma_store_wait() {
  static_assert(kPending >= 0, "groups that may remain under way");
#ifdef FASTCONV_EMULATOR
  emulator::tma_store_wait(kPending);
#else
  FASTCONV_ASM_SM90("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace ptx
}  // namespace fastconv
