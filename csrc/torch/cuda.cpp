// An NVIDIA GPU as a device: its properties, torch's current stream. Compiled only with CUDA; needs
// no CUDA library's headers, since many machines have nvcc without them.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "core/arches.h"
#include "core/kernel_table.h"

#ifndef FASTCONV_CUDA_ARCHES
#define FASTCONV_CUDA_ARCHES ""  // unknown: every card is tried
#endif

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
  if (!refuse_architecture(FASTCONV_CUDA_ARCHES, device.sm_arch, "").empty()) {
    cudaDeviceProp properties;  // for the name: filling it takes milliseconds
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
    device.unsupported = refuse_architecture(FASTCONV_CUDA_ARCHES, device.sm_arch, properties.name);
  }
  return device;
}

// Of every card, read once: an attribute costs a driver call. None of this makes a context, so that
// a process that computes on cuda:1 takes no memory on cuda:0.
const std::vector<Device>& devices() {
  static const std::vector<Device> all = [] {
    std::vector<Device> found;
    for (int i = 0; i < c10::cuda::device_count(); ++i) found.push_back(read_properties(i));
    return found;
  }();
  return all;
}

}  // namespace

Device cuda_machine_of(const at::Tensor& t) {
  return devices().at(static_cast<size_t>(t.get_device()));
}

// The stream is the current one of the tensor's device, which need not be the current device;
// launch() has made that current before it comes here.
Context cuda_context_of(const at::Tensor& t) {
  Context context;
  context.device = t.get_device();
  context.stream = c10::cuda::getCurrentCUDAStream(t.get_device()).stream();
  return context;
}

}  // namespace fastconv
