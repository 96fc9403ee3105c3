// The only place that launches a kernel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastconv {
namespace cuda {

constexpr int64_t kMaxBlocks = 0x7fffffff;  // of gridDim.x on every architecture since sm_30

// How many blocks cover `items` at `per_block` each. Kernels stride by the grid over whatever lies
// beyond the limit, so that no problem is too large to launch.
constexpr int64_t blocks_for(int64_t items, int64_t per_block) {
  return std::min((items + per_block - 1) / per_block, kMaxBlocks);
}

// Runs `kernel` on `stream`, asynchronously. `name` is the row's: an error names what was launched.
// No blocks, no launch: an empty grid is an error to CUDA and an empty tensor is none to us.
template <class... Parameters, class... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
                   void* stream, Arguments&&... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error =
      cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next, innocent caller would be told of it too
  throw std::runtime_error(std::string(name) + ": launching " + std::to_string(blocks) +
                           " blocks of " + std::to_string(threads) + " threads: " +
                           cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

}  // namespace cuda
}  // namespace fastconv
