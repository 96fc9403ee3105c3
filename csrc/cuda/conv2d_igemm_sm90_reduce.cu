#include "cuda/conv2d_igemm_sm90.h"

namespace fastconv {
namespace cuda {
namespace igemm_sm90 {
namespace {

constexpr int kThreads = 256;

// A thread a result, neighbours along the filters: that is how the partial sums lie.
template <class T>
__global__ void __launch_bounds__(kThreads)
    conv2d_igemm_sm90_reduce_kernel(const IgemmReduction t) {
  const int64_t results = t.pixels * t.K;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < results;
       i += int64_t{gridDim.x} * kThreads) {
    float sum = t.partial_sums[i];
#pragma unroll 4
    for (int split = 1; split < t.splits; ++split) sum += t.partial_sums[split * results + i];
    const Division at = divide(i, t.K);
    const int64_t offset = offset_of(t.dst, pixel_at(at.quotient, t.rows, t.cols));
    store_result<T>(t.epilogue, t.out, at.remainder, offset + at.remainder * t.dst.c, sum);
  }
}

}  // namespace

void reduce_igemm(const char* name, DType dtype, const IgemmReduction& t, void* stream) {
  dispatch_element(dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) < 8) {
      launch_kernel({name, blocks_for(t.pixels * t.K, kThreads), kThreads, stream},
                    &conv2d_igemm_sm90_reduce_kernel<T>, t);
    }
  });
}

}  // namespace igemm_sm90
}  // namespace cuda
}  // namespace fastconv
