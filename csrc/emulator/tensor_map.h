// What the emulator keeps in the 128 bytes of a CUtensorMap.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace fastconv {
namespace emulator {

constexpr uint32_t kTensorMapMark = 0x544d4150u;
constexpr int kMostDimensions = 5;

struct TensorMapFields {
  unsigned char* base;
  uint64_t strides[kMostDimensions];  // bytes, innermost first; [0] is the element's size
  uint32_t last[kMostDimensions];     // sizes less one, since 2^32 is a size
  int16_t lower[3], upper[3];         // im2col: the bounding box along W, H, D
  // Tiled: the box's sizes. Im2col: channels, pixels.
  uint16_t box[kMostDimensions];
  uint8_t steps[kMostDimensions];
  uint8_t rank, element_bytes, data_type, swizzle;  // the last two: CUDA's enumerators
  bool im2col, fill_nan;
  uint32_t mark;

  int64_t size(int dimension) const { return int64_t{last[dimension]} + 1; }
  // Elements that the box loads along a dimension of a tiled map.
  int loaded(int dimension) const {
    return (box[dimension] + steps[dimension] - 1) / steps[dimension];
  }
  // Units of 16 bytes in a swizzled row; 1: no swizzle.
  int swizzle_units() const { return 1 << swizzle; }
  int64_t shared_bytes() const {
    int64_t elements = im2col ? int64_t{box[0]} * box[1] : 1;
    for (int i = 0; !im2col && i < rank; ++i) elements *= loaded(i);
    return elements * element_bytes;
  }
};
static_assert(sizeof(TensorMapFields) <= sizeof(CUtensorMap), "128 bytes");
static_assert(CU_TENSOR_MAP_SWIZZLE_32B == 1 && CU_TENSOR_MAP_SWIZZLE_64B == 2 &&
                  CU_TENSOR_MAP_SWIZZLE_128B == 3,
              "swizzle_units()");

// Of `address` under a swizzle of so many units of 16 bytes: bits 7 and up go onto bits 4 and up.
constexpr uint32_t swizzled(uint32_t address, int units) {
  return address ^ (address >> 7 & static_cast<uint32_t>(units - 1)) << 4;
}
static_assert(swizzled(0x3f0, 8) == 0x380 && swizzled(0x3f0, 2) == 0x3e0, "bits 7 to 9");

}  // namespace emulator
}  // namespace fastconv
