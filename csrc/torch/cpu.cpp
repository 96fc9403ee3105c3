// The machine behind a tensor. The CPU: its instruction set, torch's intra-op threads; a GPU is
// asked by cuda.cpp, in builds without CUDA by Python.
#include <ATen/Parallel.h>

#include "cpu/isa.h"
#include "torch/launch.h"
#include "torch/triton.h"

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
  Device device;
  if (t.is_cuda()) {
#ifdef FASTCONV_WITH_CUDA
    device = cuda_machine_of(t);
#else
    device = gpu_seen_from_python(t.get_device());
#endif
  } else {
    device.threads = available_threads();
    device.isa = host_isa();
  }
  device.no_triton = why_no_triton(t.is_cuda());
  return device;
}

Context context_of(const at::Tensor& t, const Device& machine) {
#ifdef FASTCONV_WITH_CUDA
  if (t.is_cuda()) return cuda_context_of(t);
#endif
  Context context = cpu_context(machine.threads);
  if (t.is_cuda()) context.device = t.get_device();  // Triton's rows take torch's current stream
  return context;
}

}  // namespace fastconv
