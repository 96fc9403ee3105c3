// The second half of every split sum: partial sums of each result, added up in ascending order.
#include "cuda/conv2d.h"

namespace fastconv {
namespace cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads)
    reduce_partials_kernel(const void* partials, void* out, int64_t results, int splits) {
  using A = accumulator_t<T>;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < results;
       i += gridDim.x * int64_t{kThreads}) {
    const A* from = static_cast<const A*>(partials) + i;
    A sum = 0;
#pragma unroll 8  // eight loads in flight; the additions stay in order
    for (int s = 0; s < splits; ++s) sum += from[s * results];
    static_cast<T*>(out)[i] = narrow<T>(sum);
  }
}

}  // namespace

void reduce_partials(const char* name, DType dtype, const void* partials, void* out,
                     int64_t results, int splits, void* stream) {
  dispatch_element(dtype, [&](auto element) {
    launch_kernel({name, blocks_for(results, kThreads), kThreads, stream},
                  &reduce_partials_kernel<decltype(element)>, partials, out, results, splits);
  });
}

}  // namespace cuda
}  // namespace fastconv
