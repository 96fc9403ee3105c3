// An NVIDIA GPU as a device: its properties, torch's current stream. Compiled only with CUDA; needs
// no CUDA library's headers, since many machines have nvcc without them.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

#include "core/kernel_table.h"

namespace fastconv {
namespace {

Device read_properties(int index) {
  const auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  Device device;
  device.type = Device::Type::kCuda;
  device.sm_arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                   attribute(cudaDevAttrComputeCapabilityMinor);
  device.sm_count = attribute(cudaDevAttrMultiProcessorCount);
  device.shared_memory_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return device;
}

}  // namespace

Device cuda_machine_of(const at::Tensor& t) {
  static std::mutex mutex;
  static std::vector<Device> devices;  // read once: an attribute costs a driver call
  std::lock_guard<std::mutex> lock(mutex);
  if (devices.empty()) {
    for (int i = 0; i < c10::cuda::device_count(); ++i) devices.push_back(read_properties(i));
  }
  return devices.at(t.get_device());
}

Context cuda_context_of(const at::Tensor& t) {
  Context context;
  context.stream = c10::cuda::getCurrentCUDAStream(t.get_device()).stream();
  return context;
}

}  // namespace fastconv
