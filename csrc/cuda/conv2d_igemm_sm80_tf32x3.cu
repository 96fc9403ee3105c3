#include "cuda/conv2d_igemm_sm80_kernel.h"

namespace fastconv {
namespace cuda {

template void launch_igemm<Tf32x3>(const IgemmLaunch&, const IgemmParams&);

}  // namespace cuda
}  // namespace fastconv
