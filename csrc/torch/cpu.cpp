// The CPU as a device: its instruction set, torch's intra-op threads.
#include <ATen/Parallel.h>

#include "cpu/isa.h"
#include "torch/launch.h"

namespace fastconv {

#ifdef FASTCONV_WITH_CUDA
Device cuda_machine_of(const at::Tensor& t);
Context cuda_context_of(const at::Tensor& t);
#endif

namespace {

int available_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

Context cpu_context(int threads) {
  Context context;
  context.threads = threads;
  if (threads == 1) {
    context.parallel_for = [](int64_t n, const Context::RangeBody& body) {
      if (n > 0) body(0, n);
    };
    return context;
  }
  context.parallel_for = [](int64_t n, const Context::RangeBody& body) {
    at::parallel_for(0, n, /*grain_size=*/1, [&](int64_t begin, int64_t end) { body(begin, end); });
  };
  return context;
}

}  // namespace

Device machine_of(const at::Tensor& t) {
#ifdef FASTCONV_WITH_CUDA
  if (t.is_cuda()) return cuda_machine_of(t);
#endif
  Device device;
  device.type = t.is_cuda() ? Device::Type::kCuda : Device::Type::kCpu;
  device.threads = available_threads();
  device.isa = host_isa();
  return device;
}

Context context_of([[maybe_unused]] const at::Tensor& t, const Device& machine) {
#ifdef FASTCONV_WITH_CUDA
  if (t.is_cuda()) return cuda_context_of(t);
#endif
  return cpu_context(machine.threads);
}

}  // namespace fastconv
