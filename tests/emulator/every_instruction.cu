// Uses every function of csrc/cuda/ptx with every argument that changes its assembly. Compiled, not
// run: for sm_90a ptxas must take each instruction, for sm_80 and sm_90 the headers must still
// compile.
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/cluster.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/griddepcontrol.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/setmaxnreg.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"

namespace fastconv {
namespace ptx {
namespace {

template <int kMatrices, bool kTransposed>
__device__ void copy_matrices(uint32_t at) {
  uint32_t to[kMatrices];
  ldmatrix<kMatrices, kTransposed>(to, at);
  stmatrix<kMatrices, kTransposed>(at + 1024, to);
}

template <int kRank>
__device__ void copy_boxes(const CUtensorMap* map, uint32_t at, uint32_t barrier) {
  int position[kRank];
  for (int i = 0; i < kRank; ++i) position[i] = i;
  tma_load(at, map, barrier, position);
  tma_load_multicast(at, map, barrier, 3, position);
  tma_store(map, at, position);
}

template <class T, int N, WgmmaMajor kMajorA, WgmmaMajor kMajorB>
__device__ void multiply(uint32_t at, float* out) {
  const uint64_t a = encode_rows_of_128(at);
  const uint64_t b = encode({at, 256, 512, WgmmaSwizzle::k64});
  const uint32_t registers[4] = {at, at + 1, at + 2, at + 3};
  float d[N / 2] = {};
  wgmma_fence_registers(d);
  wgmma_fence();
  wgmma<T, N, kMajorA, kMajorB>(d, a, b, 0);
  if constexpr (kMajorA == WgmmaMajor::kK) {
    wgmma<T, N, kMajorB>(d, registers, b, 1);
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_fence_registers(d);
  for (int i = 0; i < N / 2; ++i) out[i * 128 + threadIdx.x] += d[i];
}

template <int N>
__device__ void multiply_all(uint32_t at, float* out) {
  constexpr WgmmaMajor kK = WgmmaMajor::kK, kMn = WgmmaMajor::kMn;
  multiply<__half, N, kK, kK>(at, out);
  multiply<__nv_bfloat16, N, kK, kK>(at, out);
  multiply<__nv_bfloat16, N, kMn, kK>(at, out);
  multiply<__half, N, kK, kMn>(at, out);
  multiply<__nv_bfloat16, N, kMn, kMn>(at, out);
  multiply<Tf32, N, kK, kK>(at, out);
}

__global__ void __launch_bounds__(256)
    portable(const void* from, float* out, uint32_t at, int source_bytes) {
  cp_async<4>(at, from);
  cp_async<8>(at, from, source_bytes);
  cp_async<16>(at, from, source_bytes);
  cp_async_cached_16(at, from);
  cp_async_commit();
  cp_async_wait<2>();
  cp_async_wait_all();
  named_barrier_sync(1, 64);
  named_barrier_arrive(2, 64);
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  uint32_t a[4], b[2], a8[2], b8[1];
  ldmatrix(a, at);
  ldmatrix<2, true>(b, at);
  ldmatrix(a8, at);
  ldmatrix(b8, at);
  float d[4] = {};
  mma_m16n8k16<__half>(d, a, b, d);
  mma_m16n8k16<__nv_bfloat16>(d, a, b, d);
  mma_m16n8k8<__half>(d, a8, b8, d);
  mma_m16n8k8<__nv_bfloat16>(d, a8, b8, d);
  a[0] = to_tf32(d[0]);
  mma_m16n8k8_tf32(d, a, b, d);
  for (int i = 0; i < 4; ++i) out[i] = d[i];
}

__global__ void __launch_bounds__(256)
    hopper(const __grid_constant__ CUtensorMap map, const void* from, float* out, uint32_t at) {
  const uint32_t barrier = at + 8;
  copy_matrices<1, false>(at);
  copy_matrices<1, true>(at);
  copy_matrices<2, false>(at);
  copy_matrices<2, true>(at);
  copy_matrices<4, false>(at);
  copy_matrices<4, true>(at);
  mbarrier_init(barrier, 3);
  fence_mbarrier_init();
  fence_proxy_async();
  cluster_sync();
  tma_prefetch_map(&map);
  if (elect_one()) {
    mbarrier_expect_tx(barrier, 16);
    mbarrier_arrive_expect_tx(barrier, 128);
    copy_boxes<2>(&map, at, barrier);
    copy_boxes<3>(&map, at, barrier);
    copy_boxes<4>(&map, at, barrier);
    copy_boxes<5>(&map, at, barrier);
    tma_load_im2col(at, &map, barrier, {0, 1, 2, 3, 4, 5});
    tma_load_im2col_multicast(at, &map, barrier, 3, {0, 1, 2, 3, 4, 5});
    bulk_load(at, from, 256, barrier);
    tma_store_commit();
    tma_store_wait_read<1>();
    tma_store_wait<0>();
  }
  mbarrier_arrive(barrier);
  cp_async_mbarrier_arrive_noinc(barrier);
  const uint32_t next = mapa(barrier, (cluster_rank() + 1) % cluster_size());
  mbarrier_arrive_remote(next);
  mbarrier_arrive_remote_release(next);
  mbarrier_wait(barrier, 0);
  mbarrier_wait_cluster(barrier, 1);
  const uint32_t there = mapa(at, 1);
  store_cluster(there, 1.0f);
  store_cluster(there + 4, 1u);
  out[0] = load_cluster<float>(there) + static_cast<float>(load_cluster<uint32_t>(there + 4));
  mbarrier_inval(barrier);
}

__global__ void __launch_bounds__(384, 1) registers(float* out, uint32_t at) {
  if (threadIdx.x < 128) {
    setmaxnreg_dec<40>();
    out[threadIdx.x] = 0;
  } else {
    setmaxnreg_inc<232>();
    multiply<__half, 256, WgmmaMajor::kK, WgmmaMajor::kMn>(at, out);
  }
}

__global__ void __launch_bounds__(128) products(float* out, uint32_t at) {
  multiply_all<8>(at, out);
  multiply_all<16>(at, out);
  multiply_all<32>(at, out);
  multiply_all<64>(at, out);
  multiply_all<96>(at, out);
  multiply_all<128>(at, out);
  multiply_all<192>(at, out);
  multiply_all<256>(at, out);
}

}  // namespace

const void* every_instruction(int which) {
  return which == 0   ? reinterpret_cast<const void*>(&portable)
         : which == 1 ? reinterpret_cast<const void*>(&hopper)
         : which == 2 ? reinterpret_cast<const void*>(&registers)
                      : reinterpret_cast<const void*>(&products);
}

}  // namespace ptx
}  // namespace fastconv
