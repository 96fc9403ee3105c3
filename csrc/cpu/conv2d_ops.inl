// One instruction set's copy of Conv2dOps.
#include "cpu/conv2d_simd.inl"
//
#include "cpu/activation.inl"
//
#include "cpu/conv2d_gemm.inl"
#include "cpu/conv2d_pack.inl"
#include "cpu/conv2d_store.inl"
//
#include "cpu/conv2d_depthwise.inl"
//
#include "cpu/conv2d_depthwise_plane.inl"

namespace fastconv::FASTCONV_ISA::conv2d {

template <class T>
inline const Conv2dOps<T>& ops() {
  using Acc = accumulator_t<T>;
  static const Conv2dOps<T> table = {kLanes<Acc>,
                                     kTileM,
                                     kTileVectors * kLanes<Acc>,
                                     gemm<Acc>,
                                     gemm_table<Acc>,
                                     im2row<T>,
                                     im2col<T>,
                                     permute<Acc, T, Acc>,
                                     permute<Acc, Acc, T>,
                                     store_rows<T>,
                                     add_rows<T>,
                                     sum_run<T>,
                                     depthwise_row<T>,
                                     depthwise_wgrad_row<T>,
                                     copy_plane<T>,
                                     depthwise_plane<T>,
                                     depthwise_plane_wgrad<accumulator_t<T>>};
  return table;
}

}  // namespace fastconv::FASTCONV_ISA::conv2d
