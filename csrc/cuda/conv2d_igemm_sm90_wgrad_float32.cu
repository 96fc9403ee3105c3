// Launches of Hopper's filter gradient of float32, a kernel a tile and number of products.
#include "cuda/conv2d_igemm_sm90_wgrad_float32.h"

namespace fastconv {
namespace cuda {
namespace sm90_wgrad {
namespace {

template <int kTerms>
void launch_terms(const Plan& plan, const Params& t, const CUtensorMap& grad,
                  const CUtensorMap& input, const char* name, void* stream) {
  const auto run = [&](auto tile) {
    using Tile = decltype(tile);
    SharedCarver carve;
    const Float32Memory<Tile> memory(carve);
    launch_kernel({name, plan.workers * t.cluster, kThreads, stream, carve.bytes(), t.cluster},
                  &conv2d_igemm_sm90_wgrad_float32_kernel<Tile>, grad, input, t);
  };
  if (plan.tile.rows == 64) {
    run(Float32Tile<64, 2, kTerms>());
  } else if (plan.tile.chunks == 2) {
    run(Float32Tile<128, 2, kTerms>());
  } else {
    run(Float32Tile<128, 1, kTerms>());
  }
}

}  // namespace

void launch_float32(const Plan& plan, const Params& t, const CUtensorMap& grad,
                    const CUtensorMap& input, const char* name, void* stream) {
  if (plan.terms == 3) {
    launch_terms<3>(plan, t, grad, input, name, stream);
  } else {
    launch_terms<1>(plan, t, grad, input, name, stream);
  }
  launch_reduce<float>(plan, t, name, stream);
}

}  // namespace sm90_wgrad
}  // namespace cuda
}  // namespace fastconv
