#include "cuda/conv2d_igemm_sm80_kernel.h"

namespace fastconv {
namespace cuda {

template void launch_igemm<__nv_bfloat16>(const IgemmLaunch&, const IgemmParams&);

}  // namespace cuda
}  // namespace fastconv
