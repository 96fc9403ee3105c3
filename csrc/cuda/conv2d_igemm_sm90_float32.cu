#include "cuda/conv2d_igemm_sm90_kernel.h"

namespace fastconv {
namespace cuda {
namespace igemm_sm90 {

void launch_igemm_float32(const Launch& launch, IgemmTileKind kind, const IgemmParams& t) {
  launch_igemm<float, ptx::Tf32>(launch, kind, t);
}

}  // namespace igemm_sm90
}  // namespace cuda
}  // namespace fastconv
