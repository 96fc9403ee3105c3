// wgmma: element types, sizes of N, majors and swizzles, against plain loops on small integers.
// Operands are written to shared memory element by element where PTX says they lie.
#include "cases.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/wgmma.h"

namespace fastconv {
namespace testing {
namespace {

using cuda::launch_kernel;
using cuda::shared_memory;
using cuda::SharedCarver;
using ptx::Tf32;
using ptx::WgmmaMajor;
using ptx::WgmmaSwizzle;

constexpr WgmmaMajor kK = WgmmaMajor::kK, kMn = WgmmaMajor::kMn;
constexpr int kM = 64;

template <class T>
struct Stored {
  using type = T;
};
template <>
struct Stored<Tf32> {
  using type = float;
};
template <class T>
using stored_t = typename Stored<T>::type;

__host__ __device__ constexpr int units_of(WgmmaSwizzle swizzle) {
  return swizzle == WgmmaSwizzle::k128  ? 8
         : swizzle == WgmmaSwizzle::k64 ? 4
         : swizzle == WgmmaSwizzle::k32 ? 2
                                        : 1;
}

// How a matrix of `extent` (M or N) by `k` elements lies in shared memory.
struct Layout {
  WgmmaSwizzle swizzle;
  bool mn_major;
  int element, extent, k;

  __host__ __device__ int in_unit() const { return 16 / element; }
  __host__ __device__ int lines() const { return mn_major ? k : extent; }
  __host__ __device__ int units() const { return (mn_major ? extent : k) / in_unit(); }
  __host__ __device__ int width() const { return units_of(swizzle); }
  // Unswizzled core matrices of 8 lines of a unit lie side by side along the units; swizzled
  // groups of 8 rows follow each other, then further columns of them.
  __host__ __device__ int group() const {
    return swizzle == WgmmaSwizzle::kNone ? 128 * units() : 128 * width();
  }
  __host__ __device__ int column() const {
    return swizzle == WgmmaSwizzle::kNone ? 128 : group() * (lines() / 8);
  }
  __host__ __device__ int bytes() const {
    const int columns = (units() + width() - 1) / width();
    return swizzle == WgmmaSwizzle::kNone ? group() * (lines() / 8) : column() * columns;
  }
  __host__ __device__ int offset(int mn, int kk) const {
    const int line = mn_major ? kk : mn, along = mn_major ? mn : kk;
    const int unit = along / in_unit(), byte = along % in_unit() * element;
    const int row = line / 8 * group() + line % 8 * width() * 16;
    const int at = row + unit / width() * column() + unit % width() * 16;
    return (at ^ (at / 128 % width() * 16)) + byte;
  }
  // Of the product's step `step` along K, so many bytes of a K-major row or lines of an MN-major
  // matrix on.
  __host__ __device__ ptx::WgmmaMatrix matrix(uint32_t start, int step) const {
    const int in_step = 32 / element;
    const bool plain = swizzle == WgmmaSwizzle::kNone;
    const int advance =
        mn_major ? step * in_step / 8 * group() : step * (plain ? 2 * column() : 32);
    const bool leading_is_column = !(plain && mn_major);
    return {start + static_cast<uint32_t>(advance),
            static_cast<uint32_t>(leading_is_column ? column() : group()),
            static_cast<uint32_t>(leading_is_column ? group() : column()), swizzle};
  }
};

struct Tiles {
  unsigned char *a, *b;
  __host__ __device__ Tiles(SharedCarver& carve, const Layout& la, const Layout& lb)
      : a(carve.take<unsigned char>(la.bytes(), 1024)),
        b(carve.take<unsigned char>(lb.bytes(), 1024)) {}
};

template <class E>
__device__ void fill(unsigned char* to, const E* from, const Layout& layout) {
  for (int i = static_cast<int>(threadIdx.x); i < layout.extent * layout.k; i += 128) {
    *reinterpret_cast<E*>(to + layout.offset(i / layout.k, i % layout.k)) = from[i];
  }
}

// out [64 x N] = a [64 x k] * b [N x k]^T, twice: the second time added to the first.
template <class T, int N, WgmmaMajor kMajorA, WgmmaMajor kMajorB, bool kRegistersA>
__global__ void __launch_bounds__(128)
    wgmma_kernel(const stored_t<T>* a, const stored_t<T>* b, Layout la, Layout lb, float* out) {
  SharedCarver carve(shared_memory());
  Tiles tiles(carve, la, lb);
  fill(tiles.a, a, la);
  fill(tiles.b, b, lb);
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t at_a = ptx::shared_address(tiles.a), at_b = ptx::shared_address(tiles.b);
  constexpr int kElement = sizeof(stored_t<T>), kInStep = 32 / kElement;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = 99.0f;  // the first product does not look at it
  for (int pass = 0; pass < 2; ++pass) {
    for (int step = 0; step < la.k / kInStep; ++step) {
      uint32_t registers[4];
      if constexpr (kRegistersA) {
        for (int i = 0; i < 4; ++i) {
          const int row = 16 * warp + lane / 4 + 8 * (i % 2);
          const int byte = 32 * step + 4 * (lane % 4) + 16 * (i / 2);
          memcpy(&registers[i], reinterpret_cast<const char*>(a + row * la.k) + byte, 4);
        }
      }
      ptx::wgmma_fence_registers(d);
      ptx::wgmma_fence();
      const uint64_t b_matrix = encode(lb.matrix(at_b, step));
      const int accumulate = pass + step > 0;
      if constexpr (kRegistersA) {
        ptx::wgmma<T, N, kMajorB>(d, registers, b_matrix, accumulate);
      } else {
        ptx::wgmma<T, N, kMajorA, kMajorB>(d, encode(la.matrix(at_a, step)), b_matrix, accumulate);
      }
      ptx::wgmma_commit();
      if constexpr (kRegistersA) ptx::wgmma_wait<0>();  // before the registers are written again
    }
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_fence_registers(d);
  for (int i = 0; i < N / 2; ++i) {
    const int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2);
    out[row * N + 8 * (i / 4) + 2 * (lane % 4) + i % 2] = d[i];
  }
}

template <class T, int N, WgmmaMajor kMajorA, WgmmaMajor kMajorB, bool kRegistersA>
void wgmma_one(uint64_t seed, WgmmaSwizzle swizzle_a, WgmmaSwizzle swizzle_b, int k) {
  using E = stored_t<T>;
  constexpr int kElement = sizeof(E);
  const Layout la = {swizzle_a, kMajorA == kMn, kElement, kM, k};
  const Layout lb = {swizzle_b, kMajorB == kMn, kElement, N, k};
  const auto a = small_integers<E>(static_cast<size_t>(kM * k), seed);
  auto b = small_integers<E>(static_cast<size_t>(N * k), seed + 1);
  std::vector<float> want(static_cast<size_t>(kM * N));
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < N; ++n) {
      float sum = 0.0f;
      for (int i = 0; i < k; ++i) {
        sum += static_cast<float>(a[m * k + i]) * static_cast<float>(b[n * k + i]);
      }
      want[m * N + n] = 2 * sum;
    }
  }
  if constexpr (std::is_same_v<T, Tf32>) {  // bits that TF32 has not
    for (E& x : b) {
      if (x != 0.0f) x *= 1.0f + 0x1p-11f;
    }
  }
  SharedCarver carve;
  Tiles tiles(carve, la, lb);
  Array<E> a_in(a), b_in(b);
  Array<float> out(want.size());
  launch_kernel({"wgmma", 1, 128, nullptr, carve.bytes()},
                &wgmma_kernel<T, N, kMajorA, kMajorB, kRegistersA>, a_in.get(), b_in.get(), la, lb,
                out.get());
  expect_equal(out.read(), want,
               "wgmma with N " + std::to_string(N) + ", swizzles of " +
                   std::to_string(units_of(swizzle_a)) + " and " +
                   std::to_string(units_of(swizzle_b)) + " units");
}

// Every swizzle of one instruction. K: what the widest swizzled K-major row holds.
template <class T, int N, WgmmaMajor kMajorA = kK, WgmmaMajor kMajorB = kK,
          bool kRegistersA = false>
void wgmma_case(uint64_t seed) {
  constexpr WgmmaSwizzle kAll[] = {WgmmaSwizzle::k128, WgmmaSwizzle::k64, WgmmaSwizzle::k32,
                                   WgmmaSwizzle::kNone};
  for (int i = 0; i < 4; ++i) {
    // The other operand has another swizzle, of which a K-major row is at least as long.
    const WgmmaSwizzle a = kAll[i], b = kAll[kMajorB == kMn ? 3 - i : i];
    const int narrowest =
        kMajorA == kK && (kMajorB == kMn || units_of(a) < units_of(b)) ? units_of(a) : units_of(b);
    const bool rows = kMajorA == kK || kMajorB == kK;
    const int units = rows && narrowest > 1 ? narrowest : 4;
    wgmma_one<T, N, kMajorA, kMajorB, kRegistersA>(
        seed, a, b, units * 16 / static_cast<int>(sizeof(stored_t<T>)));
  }
}

using Bf16 = __nv_bfloat16;
const Register bf16_8("wgmma_bf16_n8", wgmma_case<Bf16, 8>);
const Register bf16_16("wgmma_bf16_n16", wgmma_case<Bf16, 16>);
const Register bf16_32("wgmma_bf16_n32", wgmma_case<Bf16, 32>);
const Register bf16_64("wgmma_bf16_n64", wgmma_case<Bf16, 64>);
const Register bf16_96("wgmma_bf16_n96", wgmma_case<Bf16, 96>);
const Register bf16_128("wgmma_bf16_n128", wgmma_case<Bf16, 128>);
const Register bf16_192("wgmma_bf16_n192", wgmma_case<Bf16, 192>);
const Register bf16_256("wgmma_bf16_n256", wgmma_case<Bf16, 256>);
const Register f16_128("wgmma_f16_n128", wgmma_case<__half, 128>);
const Register tf32_8("wgmma_tf32_n8", wgmma_case<Tf32, 8>);
const Register tf32_96("wgmma_tf32_n96", wgmma_case<Tf32, 96>);
const Register tf32_256("wgmma_tf32_n256", wgmma_case<Tf32, 256>);
const Register mn_k("wgmma_bf16_n64_a_mn_major", wgmma_case<Bf16, 64, kMn, kK>);
const Register k_mn("wgmma_bf16_n128_b_mn_major", wgmma_case<Bf16, 128, kK, kMn>);
const Register mn_mn("wgmma_f16_n192_both_mn_major", wgmma_case<__half, 192, kMn, kMn>);
const Register rs_bf16("wgmma_bf16_n64_a_registers", wgmma_case<Bf16, 64, kK, kK, true>);
const Register rs_mn("wgmma_f16_n64_a_registers_b_mn_major", wgmma_case<__half, 64, kK, kMn, true>);
const Register rs_tf32("wgmma_tf32_n32_a_registers", wgmma_case<Tf32, 32, kK, kK, true>);

}  // namespace
}  // namespace testing
}  // namespace fastconv
