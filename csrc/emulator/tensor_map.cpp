// The driver's functions that make tensor maps, as the emulator has them, and the runtime's that
// finds them. They check what cuda.h says of their arguments.
#include "emulator/tensor_map.h"

#include <cuda_runtime_api.h>

#include <cstring>

namespace fastconv {
namespace emulator {
namespace {

int bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
      return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 0;
  }
}

// What both kinds have in common. False: an argument is wrong.
bool fill(TensorMapFields& map, CUtensorMapDataType type, cuuint32_t rank, void* base,
          const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* steps,
          CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
          CUtensorMapFloatOOBfill outside) {
  const int bytes = bytes_of(type);
  if (bytes == 0 || rank < 1 || rank > kMostDimensions) return false;
  if (base == nullptr || reinterpret_cast<uintptr_t>(base) % 16 != 0) return false;
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle > CU_TENSOR_MAP_SWIZZLE_128B) {
    return false;
  }
  map.base = static_cast<unsigned char*>(base);
  map.strides[0] = static_cast<uint64_t>(bytes);
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > uint64_t{1} << 32) return false;
    map.last[i] = static_cast<uint32_t>(sizes[i] - 1);
    if (i + 1 < rank) {
      if (strides[i] % 16 != 0 || strides[i] >= uint64_t{1} << 40) return false;
      map.strides[i + 1] = strides[i];
    }
    if (steps[i] < 1 || steps[i] > 8) return false;
    map.steps[i] = i == 0 ? 1 : static_cast<uint8_t>(steps[i]);  // the first is ignored
  }
  const bool is_float = type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  map.fill_nan = outside != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  if (map.fill_nan && !is_float) return false;
  map.rank = static_cast<uint8_t>(rank);
  map.element_bytes = static_cast<uint8_t>(bytes);
  map.data_type = static_cast<uint8_t>(type);
  map.swizzle = static_cast<uint8_t>(swizzle);
  map.mark = kTensorMapMark;
  return true;
}

bool row_fits(const TensorMapFields& map) {
  const int row = map.box[0] * map.element_bytes;
  return row % 16 == 0 && (map.swizzle == 0 || row <= 16 * map.swizzle_units());
}

CUresult store(CUtensorMap* to, const TensorMapFields& map) {
  if (reinterpret_cast<uintptr_t>(to) % 64 != 0) return CUDA_ERROR_INVALID_VALUE;
  std::memset(to, 0, sizeof(*to));
  std::memcpy(static_cast<void*>(to), &map, sizeof(map));
  return CUDA_SUCCESS;
}

CUresult encode_tiled(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* base,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill outside) {
  TensorMapFields map = {};
  if (!fill(map, type, rank, base, sizes, strides, steps, interleave, swizzle, outside)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (box[i] < 1 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    map.box[i] = static_cast<uint16_t>(box[i]);
  }
  return row_fits(map) ? store(to, map) : CUDA_ERROR_INVALID_VALUE;
}

CUresult encode_im2col(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* base,
                       const cuuint64_t* sizes, const cuuint64_t* strides, const int* lower,
                       const int* upper, cuuint32_t channels, cuuint32_t pixels,
                       const cuuint32_t* steps, CUtensorMapInterleave interleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                       CUtensorMapFloatOOBfill outside) {
  TensorMapFields map = {};
  if (rank < 3 ||
      !fill(map, type, rank, base, sizes, strides, steps, interleave, swizzle, outside)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const int limit = rank == 3 ? 32768 : rank == 4 ? 128 : 16;
  for (cuuint32_t i = 0; i + 2 < rank; ++i) {
    const bool in_range =
        lower[i] >= -limit && lower[i] < limit && upper[i] >= -limit && upper[i] < limit;
    if (!in_range || map.size(static_cast<int>(i) + 1) - 1 + upper[i] < lower[i]) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    map.lower[i] = static_cast<int16_t>(lower[i]);
    map.upper[i] = static_cast<int16_t>(upper[i]);
  }
  if (channels < 1 || channels > 256 || pixels < 1 || pixels > 1024) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  map.im2col = true;
  map.box[0] = static_cast<uint16_t>(channels);
  map.box[1] = static_cast<uint16_t>(pixels);
  return row_fits(map) ? store(to, map) : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace
}  // namespace emulator
}  // namespace fastconv

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function,
                                                        unsigned int, unsigned long long,
                                                        cudaDriverEntryPointQueryResult* result) {
  *function = nullptr;
  if (std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0) {
    *function = reinterpret_cast<void*>(&fastconv::emulator::encode_tiled);
  } else if (std::strcmp(symbol, "cuTensorMapEncodeIm2col") == 0) {
    *function = reinterpret_cast<void*>(&fastconv::emulator::encode_im2col);
  }
  if (result != nullptr) {
    *result =
        *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  }
  return cudaSuccess;
}
