// Tensor maps, which tell TMA where a tensor lies: made on the host, passed to the kernel as a
// `const __grid_constant__ CUtensorMap` parameter. Every limit is checked here, since the driver
// only says "invalid value" and some mistakes show up at the launch alone.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace fastconv {
namespace cuda {

template <class T>
constexpr CUtensorMapDataType kMapType =
    std::is_same_v<T, float>    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
    : std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

constexpr int element_bytes(CUtensorMapDataType type) {
  return type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 || type == CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 ? 4
                                                                                             : 2;
}
// Bytes of a row in shared memory under a swizzle; 0: no swizzle.
constexpr int row_bytes(CUtensorMapSwizzle swizzle) {
  return swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
         : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
         : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                                                : 0;
}

constexpr int kMapRank = 5;  // the most dimensions
// Dimensions are listed innermost first. Strides count elements; that of the innermost is 1.
struct TiledMap {
  CUtensorMapDataType type;  // FLOAT16, BFLOAT16, FLOAT32 or TFLOAT32, which rounds as it loads
  const void* base;
  int rank;  // 2 to 5
  int64_t sizes[kMapRank];
  int64_t strides[kMapRank];
  int box[kMapRank];                      // elements that one copy moves along each dimension
  int steps[kMapRank] = {1, 1, 1, 1, 1};  // a copy takes every steps[i]-th: box[i] / steps[i]
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
  bool outside_is_nan = false;  // instead of zero
};

// An NHWC tensor as a convolution's window sees it: dimensions (C, W, H, N). A copy moves `pixels`
// window positions of `channels` channels. Positions run over lower .. size - 1 + upper along W and
// H, in steps of the convolution's stride:
//   fprop, wgrad: lower = -pad, upper = pad - (S - 1) * dilation, R for H
//   dgrad:        lower = pad - (S - 1) * dilation, upper = lower + W - Q
struct Im2colMap {
  CUtensorMapDataType type;
  const void* base;
  int64_t sizes[4];
  int64_t strides[4];
  int lower[2], upper[2], steps[2];  // along W, then H
  int channels, pixels;
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
  bool outside_is_nan = false;
};

namespace detail {

struct MapLimit {
  const char* what;
  int dimension;  // -1: of the whole map
  int64_t value, least, most, multiple_of;
};

inline std::string broken(const MapLimit& limit) {
  if (limit.value >= limit.least && limit.value <= limit.most &&
      limit.value % limit.multiple_of == 0) {
    return {};
  }
  std::string text = std::string("tensor map: ") + limit.what;
  if (limit.dimension >= 0) text += " of dimension " + std::to_string(limit.dimension);
  text += " is " + std::to_string(limit.value) + ", not in " + std::to_string(limit.least) +
          " .. " + std::to_string(limit.most);
  if (limit.multiple_of > 1) text += " or no multiple of " + std::to_string(limit.multiple_of);
  return text;
}

// What tiled and im2col maps have in common.
inline std::string refuse_tensor(CUtensorMapDataType type, const void* base, int rank,
                                 const int64_t* sizes, const int64_t* strides, int inner_box,
                                 CUtensorMapSwizzle swizzle) {
  constexpr int64_t kMost = INT64_MAX;
  const int bytes = element_bytes(type), row = row_bytes(swizzle);
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(base));
  std::string reason = broken({"the tensor's address", -1, address, 1, kMost, 16});
  for (int i = 0; i < rank && reason.empty(); ++i) {
    reason = broken({"the size", i, sizes[i], 1, int64_t{1} << 32, 1});
    if (!reason.empty()) break;
    reason =
        i == 0
            ? broken({"the stride", 0, strides[0], 1, 1, 1})
            : broken({"the stride in bytes", i, strides[i] * bytes, 0, (int64_t{1} << 40) - 1, 16});
  }
  if (!reason.empty()) return reason;
  // Rows shorter than the swizzle's leave gaps of which no two documents say the same.
  return row == 0 ? broken({"the box's row in bytes", -1, inner_box * bytes, 16, kMost, 16})
                  : broken({"the box's row in bytes under this swizzle", -1, inner_box * bytes, row,
                            row, 1});
}

template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess || found == nullptr) {
    throw std::runtime_error(std::string("the CUDA driver has no ") + name +
                             ": TMA needs one for CUDA 12.0 or newer");
  }
  return reinterpret_cast<Function>(found);
}

inline void check_encoded(CUresult result, const char* name) {
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(name) + ": CUDA driver error " +
                             std::to_string(static_cast<int>(result)));
  }
}

}  // namespace detail

// Why the map cannot be made; empty: it can. For supports(), where `base` may be any aligned value.
inline std::string refuse(const TiledMap& map) {
  std::string reason = detail::broken({"the rank", -1, map.rank, 2, kMapRank, 1});
  if (reason.empty()) {
    reason = detail::refuse_tensor(map.type, map.base, map.rank, map.sizes, map.strides, map.box[0],
                                   map.swizzle);
  }
  for (int i = 0; i < map.rank && reason.empty(); ++i) {
    reason = detail::broken({"the box", i, map.box[i], 1, 256, 1});
    if (reason.empty()) reason = detail::broken({"the step", i, map.steps[i], 1, i ? 8 : 1, 1});
  }
  return reason;
}

inline std::string refuse(const Im2colMap& map) {
  std::string reason = detail::refuse_tensor(map.type, map.base, 4, map.sizes, map.strides,
                                             map.channels, map.swizzle);
  for (int i = 0; i < 2 && reason.empty(); ++i) {
    const int64_t last = map.sizes[i + 1] - 1 + map.upper[i];
    const detail::MapLimit limits[] = {
        {"the bounding box's lower corner", i + 1, map.lower[i], -128, 127, 1},
        {"the bounding box's upper corner", i + 1, map.upper[i], -128, 127, 1},
        {"the bounding box's extent", i + 1, last - map.lower[i] + 1, 1, INT64_MAX, 1},
        {"the step", i + 1, map.steps[i], 1, 8, 1},
    };
    for (const detail::MapLimit& limit : limits) {
      if (reason.empty()) reason = detail::broken(limit);
    }
  }
  if (reason.empty()) reason = detail::broken({"channels a pixel", -1, map.channels, 1, 256, 1});
  if (reason.empty()) reason = detail::broken({"pixels a column", -1, map.pixels, 1, 1024, 1});
  return reason;
}

namespace detail {

// The driver's argument lists.
struct MapArguments {
  cuuint64_t sizes[kMapRank], strides[kMapRank];  // bytes, from dimension 1 on
  cuuint32_t box[kMapRank], steps[kMapRank];

  MapArguments(CUtensorMapDataType type, int rank, const int64_t* s, const int64_t* t) {
    for (int i = 0; i < rank; ++i) {
      sizes[i] = static_cast<cuuint64_t>(s[i]);
      if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(t[i] * element_bytes(type));
      box[i] = steps[i] = 1;
    }
  }
};

inline CUtensorMapFloatOOBfill outside(bool is_nan) {
  return is_nan ? CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA
                : CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
}

}  // namespace detail

namespace detail {

// A map in a place of its own: g++ 12 does not align a discarded result, in whose place a returned
// variable would be made, and the driver insists on 64 bytes.
struct Encoded {
  CUtensorMap map;
};

}  // namespace detail

// Throws std::runtime_error with what refuse() says.
inline CUtensorMap encode(const TiledMap& map) {
  static const auto function =
      detail::driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const std::string reason = refuse(map);
  if (!reason.empty()) throw std::runtime_error(reason);
  detail::MapArguments arguments(map.type, map.rank, map.sizes, map.strides);
  for (int i = 0; i < map.rank; ++i) {
    arguments.box[i] = static_cast<cuuint32_t>(map.box[i]);
    arguments.steps[i] = static_cast<cuuint32_t>(map.steps[i]);
  }
  detail::Encoded encoded;
  detail::check_encoded(
      function(&encoded.map, map.type, static_cast<cuuint32_t>(map.rank),
               const_cast<void*>(map.base), arguments.sizes, arguments.strides, arguments.box,
               arguments.steps, CU_TENSOR_MAP_INTERLEAVE_NONE, map.swizzle,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, detail::outside(map.outside_is_nan)),
      "cuTensorMapEncodeTiled");
  return encoded.map;
}

inline CUtensorMap encode(const Im2colMap& map) {
  static const auto function =
      detail::driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  const std::string reason = refuse(map);
  if (!reason.empty()) throw std::runtime_error(reason);
  detail::MapArguments arguments(map.type, 4, map.sizes, map.strides);
  arguments.steps[1] = static_cast<cuuint32_t>(map.steps[0]);
  arguments.steps[2] = static_cast<cuuint32_t>(map.steps[1]);
  detail::Encoded encoded;
  detail::check_encoded(
      function(&encoded.map, map.type, 4, const_cast<void*>(map.base), arguments.sizes,
               arguments.strides, map.lower, map.upper, static_cast<cuuint32_t>(map.channels),
               static_cast<cuuint32_t>(map.pixels), arguments.steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               map.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
               detail::outside(map.outside_is_nan)),
      "cuTensorMapEncodeIm2col");
  return encoded.map;
}

}  // namespace cuda
}  // namespace fastconv
