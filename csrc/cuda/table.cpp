#include "cuda/table.h"

namespace fastconv {

void add_cuda_kernels(KernelTable& table) {
#ifdef FASTCONV_SM90A
  add_cuda_conv2d_igemm_sm90_rows(table);
#endif
  add_cuda_conv2d_small_channel_rows(table);
  add_cuda_conv2d_depthwise_rows(table);
  add_cuda_conv2d_depthwise_wgrad_rows(table);
  add_cuda_conv2d_igemm_sm80_rows(table);
  add_cuda_conv2d_tiled_rows(table);
#ifdef FASTCONV_SM90A
  add_cuda_conv2d_igemm_sm90_wgrad_rows(table);
#endif
  add_cuda_conv2d_igemm_sm80_wgrad_rows(table);
  add_cuda_conv2d_tiled_wgrad_rows(table);
  add_cuda_conv2d_direct_fprop_rows(table);
  add_cuda_conv2d_direct_dgrad_rows(table);
  add_cuda_conv2d_direct_wgrad_rows(table);
  add_cuda_conv2d_bgrad_rows(table);
  add_cuda_conv2d_max_pool2d_rows(table);
  add_cuda_max_pool2d_rows(table);
  add_cuda_avg_pool2d_rows(table);
  add_cuda_batch_norm_rows(table);
}

}  // namespace fastconv
