#include "cuda/conv2d_igemm_sm90_kernel.h"

namespace fastconv {
namespace cuda {
namespace igemm_sm90 {

void launch_igemm_bfloat16(const Launch& launch, IgemmTileKind kind, const IgemmParams& t) {
  launch_igemm<__nv_bfloat16, __nv_bfloat16>(launch, kind, t);
}

}  // namespace igemm_sm90
}  // namespace cuda
}  // namespace fastconv
