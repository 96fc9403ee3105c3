#include "cuda/conv2d_igemm_sm90_kernel.h"

namespace fastconv {
namespace cuda {

void launch_igemm_bfloat16(const Launch& launch, IgemmTileKind kind, const IgemmParams& t) {
  launch_igemm<__nv_bfloat16, __nv_bfloat16>(launch, kind, t);
}

}  // namespace cuda
}  // namespace fastconv
