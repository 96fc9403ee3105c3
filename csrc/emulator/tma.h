// What cuda/ptx/tma.h means.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace fastconv {
namespace emulator {

void tma_prefetch_map(const CUtensorMap* map);
void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int rank, const int* at);
void tma_load_multicast(uint32_t to, const CUtensorMap* map, uint32_t barrier, uint16_t blocks,
                        int rank, const int* at);
void tma_load_im2col(uint32_t to, const CUtensorMap* map, uint32_t barrier, const int* at,
                     const uint16_t* offsets);
void tma_load_im2col_multicast(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                               uint16_t blocks, const int* at, const uint16_t* offsets);
void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
void tma_store(const CUtensorMap* map, uint32_t from, int rank, const int* at);
void tma_store_commit();
void tma_store_wait(int pending);

}  // namespace emulator
}  // namespace fastconv
