#include "cuda/conv2d_igemm_sm90_kernel.h"

namespace fastconv {
namespace cuda {

void launch_igemm_float16(const Launch& launch, IgemmTileKind kind, const IgemmParams& t) {
  launch_igemm<__half, __half>(launch, kind, t);
}

}  // namespace cuda
}  // namespace fastconv
