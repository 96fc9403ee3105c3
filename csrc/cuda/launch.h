// The only place that launches a kernel, and how a kernel finds its shared memory.
#pragma once

#ifdef FASTCONV_EMULATOR
#include "emulator/cuda.h"
#else
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/dtype.h"

namespace fastconv {
namespace cuda {

constexpr int64_t kMaxBlocks = 0x7fffffff;  // of gridDim.x on every architecture since sm_30

// How many blocks cover `items` at `per_block` each. Kernels stride by the grid over whatever lies
// beyond the limit, so that no problem is too large to launch.
constexpr int64_t blocks_for(int64_t items, int64_t per_block) {
  return std::min((items + per_block - 1) / per_block, kMaxBlocks);
}

struct Launch {
  const char* name;  // the row's: an error and the emulator's launch log carry it
  int64_t blocks;
  int threads;  // a block
  void* stream = nullptr;
  int64_t shared_bytes = 0;  // a block, all of it dynamic
  int cluster = 1;           // blocks a cluster; it divides `blocks`
  // Programmatic dependent launch: blocks may start while the stream's previous kernel still runs,
  // and call ptx::griddepcontrol_wait() before they touch what that one writes.
  bool overlap_previous = false;
};

// Runs `kernel` asynchronously. No blocks, no launch: an empty grid is an error to CUDA and an
// empty tensor is none to us.
template <class... Parameters, class... Arguments>
void launch_kernel(const Launch& launch, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (launch.blocks == 0) return;
#ifdef FASTCONV_EMULATOR
  emulator::launch({launch.name, launch.blocks, launch.threads, launch.shared_bytes, launch.cluster,
                    launch.overlap_previous},
                   [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  const auto check = [&](cudaError_t error, const char* doing) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next, innocent caller would be told of it too
    throw std::runtime_error(std::string(launch.name) + ": " + doing + " " +
                             std::to_string(launch.blocks) + " blocks of " +
                             std::to_string(launch.threads) + " threads and " +
                             std::to_string(launch.shared_bytes) + " bytes of shared memory: " +
                             cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
  };
  constexpr int64_t kWithoutOptIn = 48 * 1024;
  if (launch.shared_bytes > kWithoutOptIn) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(launch.shared_bytes)),
          "preparing");
  }
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = attributes;
  if (launch.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(launch.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (launch.overlap_previous) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "launching");
#endif
}

// Where a block's shared memory begins: 1024 bytes' alignment is what a 128-byte swizzle asks for.
__device__ inline unsigned char* shared_memory() {
#ifdef FASTCONV_EMULATOR
  return emulator::shared_memory();
#else
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
#endif
}

// Hands out a block's shared memory array by array. The host walks the same calls over no memory to
// learn how many bytes to ask for:
//   template <class Carver> struct Tiles { explicit Tiles(SharedCarver& carve) : a(carve.take..) };
// Under the emulator a poisoned gap follows each array, so that an overrun is seen.
class SharedCarver {
 public:
  FASTCONV_HOST_DEVICE explicit SharedCarver(unsigned char* base = nullptr) : base_(base) {}

  template <class T>
  FASTCONV_HOST_DEVICE T* take(int64_t count, int64_t alignment = 16) {
    offset_ = (offset_ + alignment - 1) / alignment * alignment;
#ifdef __CUDA_ARCH__
    unsigned char* at = base_ + offset_;  // a test for null would hide that this is shared memory
#else
    unsigned char* at = base_ == nullptr ? nullptr : base_ + offset_;
#endif
    offset_ += count * static_cast<int64_t>(sizeof(T));
#ifdef FASTCONV_EMULATOR
    if (base_ != nullptr) emulator::poison_gap(base_ + offset_, emulator::kSharedGap);
    offset_ += emulator::kSharedGap;
#endif
    return reinterpret_cast<T*>(at);
  }
  FASTCONV_HOST_DEVICE int64_t bytes() const { return offset_; }

 private:
  unsigned char* base_;
  int64_t offset_ = 0;
};

}  // namespace cuda
}  // namespace fastconv
