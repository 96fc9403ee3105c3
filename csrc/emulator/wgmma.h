// What cuda/ptx/wgmma.h means.
#pragma once

#include <cstdint>

#include "emulator/mma.h"

namespace fastconv {
namespace emulator {

struct WgmmaShape {
  MmaType type;
  int n;
  bool mn_major_a, mn_major_b;
};

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
void wgmma(const WgmmaShape& shape, float* d, uint64_t a_matrix, uint64_t b_matrix,
           bool accumulate);
void wgmma(const WgmmaShape& shape, float* d, const uint32_t* a, uint64_t b_matrix,
           bool accumulate);

}  // namespace emulator
}  // namespace fastconv
