#include "cuda/conv2d_igemm_sm90_kernel.h"

namespace fastconv {
namespace cuda {
namespace igemm_sm90 {

void launch_igemm_float16(const Launch& launch, IgemmTileKind kind, const IgemmParams& t) {
  launch_igemm<__half, __half>(launch, kind, t);
}

}  // namespace igemm_sm90
}  // namespace cuda
}  // namespace fastconv
