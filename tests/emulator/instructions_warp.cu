// The instructions of a thread or a warp, each against plain loops on small integers.
#include "cases.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/mma.h"

namespace fastconv {
namespace testing {
namespace {

using cuda::launch_kernel;
using cuda::shared_memory;
using cuda::SharedCarver;

constexpr int kThreads = 64;

// ---- cp.async ----

// Thread t copies kBytes at t * kBytes, of which t % (kBytes + 1) come from `from` and the rest is
// zero; twice, in two groups, of which the first is used before the second has landed.
template <int kBytes>
__global__ void cp_async_kernel(const unsigned char* from, unsigned char* out) {
  SharedCarver carve(shared_memory());
  auto* first = carve.take<unsigned char>(kThreads * kBytes);
  auto* second = carve.take<unsigned char>(kThreads * kBytes);
  const int t = static_cast<int>(threadIdx.x), at = t * kBytes;
  ptx::cp_async<kBytes>(ptx::shared_address(first + at), from + at, t % (kBytes + 1));
  ptx::cp_async_commit();
  ptx::cp_async<kBytes>(ptx::shared_address(second + at), from + at);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  for (int i = 0; i < kBytes; ++i) out[at + i] = first[at + i];
  ptx::cp_async_wait<0>();
  __syncthreads();  // then the copies of other threads are seen too
  const int other = (t + 1) % kThreads * kBytes;
  for (int i = 0; i < kBytes; ++i) out[kThreads * kBytes + at + i] = second[other + i];
}

template <int kBytes>
void cp_async_case(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<unsigned char> from(kThreads * kBytes), want(2 * from.size());
  for (auto& value : from) value = static_cast<unsigned char>(random() % 250 + 1);
  for (int t = 0; t < kThreads; ++t) {
    for (int i = 0; i < kBytes; ++i) {
      want[t * kBytes + i] = i < t % (kBytes + 1) ? from[t * kBytes + i] : 0;
      want[from.size() + t * kBytes + i] = from[(t + 1) % kThreads * kBytes + i];
    }
  }
  SharedCarver carve;
  carve.take<unsigned char>(kThreads * kBytes);
  carve.take<unsigned char>(kThreads * kBytes);
  Array<unsigned char> in(from), out(want.size());
  launch_kernel({"cp_async", 1, kThreads, nullptr, carve.bytes()}, &cp_async_kernel<kBytes>,
                in.get(), out.get());
  expect_equal(out.read(), want, "cp.async of " + std::to_string(kBytes) + " bytes");
}

const Register cp_async_4("cp_async_4", cp_async_case<4>);
const Register cp_async_8("cp_async_8", cp_async_case<8>);
const Register cp_async_16("cp_async_16", cp_async_case<16>);

// ---- ldmatrix, stmatrix ----

constexpr int kPitch = 24;  // elements; a multiple of 8, since rows are aligned to 16 bytes

// registers -> out, shared -> registers; then the registers go back to another place by stmatrix.
template <int kMatrices, bool kTransposed>
__global__ void matrices_kernel(const uint16_t* from, uint16_t* registers, uint16_t* stored) {
  SharedCarver carve(shared_memory());
  auto* a = carve.take<uint16_t>(8 * kMatrices * kPitch);
  auto* b = carve.take<uint16_t>(8 * kMatrices * kPitch);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 8 * kMatrices * kPitch; i += 32) a[i] = from[i];
  __syncwarp();
  const int row = lane % (8 * kMatrices) * kPitch;
  uint32_t to[kMatrices];
  ptx::ldmatrix<kMatrices, kTransposed>(to, ptx::shared_address(a + row));
  for (int m = 0; m < kMatrices; ++m) {
    registers[(m * 32 + lane) * 2] = static_cast<uint16_t>(to[m]);
    registers[(m * 32 + lane) * 2 + 1] = static_cast<uint16_t>(to[m] >> 16);
  }
  ptx::stmatrix<kMatrices, kTransposed>(ptx::shared_address(b + row), to);
  __syncwarp();
  for (int i = lane; i < 8 * kMatrices * 8; i += 32) stored[i] = b[i / 8 * kPitch + i % 8];
}

template <int kMatrices, bool kTransposed>
void matrices_case(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint16_t> from(8 * kMatrices * kPitch);
  for (auto& value : from) value = static_cast<uint16_t>(random());
  std::vector<uint16_t> registers(kMatrices * 64), stored(kMatrices * 64);
  for (int i = 0; i < 8 * kMatrices * 8; ++i) stored[i] = from[i / 8 * kPitch + i % 8];
  for (int m = 0; m < kMatrices; ++m) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        const int first = lane / 4, second = lane % 4 * 2 + half;
        const int row = kTransposed ? second : first, column = kTransposed ? first : second;
        registers[(m * 32 + lane) * 2 + half] = from[(8 * m + row) * kPitch + column];
      }
    }
  }
  SharedCarver carve;
  carve.take<uint16_t>(8 * kMatrices * kPitch);
  carve.take<uint16_t>(8 * kMatrices * kPitch);
  Array<uint16_t> in(from), out(registers.size()), back(stored.size());
  launch_kernel({"matrices", 1, 32, nullptr, carve.bytes()},
                &matrices_kernel<kMatrices, kTransposed>, in.get(), out.get(), back.get());
  expect_equal(out.read(), registers, "ldmatrix");
  expect_equal(back.read(), stored, "stmatrix");
}

const Register matrices_1("ldmatrix_stmatrix_x1", matrices_case<1, false>);
const Register matrices_2("ldmatrix_stmatrix_x2", matrices_case<2, false>);
const Register matrices_4("ldmatrix_stmatrix_x4", matrices_case<4, false>);
const Register matrices_1t("ldmatrix_stmatrix_x1_trans", matrices_case<1, true>);
const Register matrices_2t("ldmatrix_stmatrix_x2_trans", matrices_case<2, true>);
const Register matrices_4t("ldmatrix_stmatrix_x4_trans", matrices_case<4, true>);

// ---- mma.sync ----

// The two elements of a 32-bit register, or its one.
template <class T>
__device__ uint32_t pack(const T* at, int64_t distance) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(*at);
  } else {
    uint16_t bits[2];
    memcpy(&bits[0], at, 2);
    memcpy(&bits[1], at + distance, 2);
    return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
  }
}

// d [16 x 8] = a [16 x K] b [K x 8] + c, all row by row; T float: TF32.
template <class T, int K>
__global__ void mma_kernel(const T* a, const T* b, const float* c, float* d) {
  constexpr int kPair = sizeof(T) == 4 ? 1 : 2;
  constexpr int kRegistersB = K / (4 * kPair), kRegistersA = 2 * kRegistersB;
  const int group = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  uint32_t a_registers[kRegistersA], b_registers[kRegistersB];
  for (int i = 0; i < kRegistersA; ++i) {
    const int row = group + 8 * (i % 2), column = kPair * t + 4 * kPair * (i / 2);
    a_registers[i] = pack(a + row * K + column, 1);
  }
  for (int i = 0; i < kRegistersB; ++i) {
    b_registers[i] = pack(b + (kPair * t + 4 * kPair * i) * 8 + group, 8);
  }
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(group + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  if constexpr (kPair == 1) {
    ptx::mma_m16n8k8_tf32(sum, a_registers, b_registers, sum);
  } else if constexpr (K == 16) {
    ptx::mma_m16n8k16<T>(sum, a_registers, b_registers, sum);
  } else {
    ptx::mma_m16n8k8<T>(sum, a_registers, b_registers, sum);
  }
  for (int i = 0; i < 4; ++i) d[(group + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

template <class T, int K>
void mma_case(uint64_t seed) {
  auto a = small_integers<T>(16 * K, seed);
  const auto b = small_integers<T>(K * 8, seed + 1);
  const auto c = small_integers<float>(16 * 8, seed + 2);
  std::vector<float> want = c;
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      for (int k = 0; k < K; ++k) {
        want[m * 8 + n] += static_cast<float>(a[m * K + k]) * static_cast<float>(b[k * 8 + n]);
      }
    }
  }
  if constexpr (sizeof(T) == 4) {  // bits that TF32 has not
    for (T& x : a) {
      if (x != 0.0f) x *= 1.0f + 0x1p-11f + 0x1p-20f;
    }
  }
  Array<T> a_in(a), b_in(b);
  Array<float> c_in(c), out(want.size());
  launch_kernel({"mma", 1, 32}, &mma_kernel<T, K>, a_in.get(), b_in.get(), c_in.get(), out.get());
  expect_equal(out.read(), want, "mma.sync");
}

const Register mma_bf16_16("mma_bf16_k16", mma_case<__nv_bfloat16, 16>);
const Register mma_f16_16("mma_f16_k16", mma_case<__half, 16>);
const Register mma_bf16_8("mma_bf16_k8", mma_case<__nv_bfloat16, 8>);
const Register mma_f16_8("mma_f16_k8", mma_case<__half, 8>);
const Register mma_tf32("mma_tf32_k8", mma_case<float, 8>);

// ---- cvt.rna.tf32 ----

__global__ void to_tf32_kernel(const float* x, float* out) {
  out[threadIdx.x] = __uint_as_float(ptx::to_tf32(x[threadIdx.x]));
}

const Register to_tf32_case("to_tf32", [](uint64_t) {
  const float ulp = 0x1p-10f;  // of TF32 at 1
  const std::vector<float> x = {0.0f,
                                1.0f,
                                1.0f + ulp / 2,
                                1.0f + ulp / 2 - 0x1p-23f,
                                -1.0f - ulp / 2,
                                1.0f + 3 * ulp / 2,
                                2.0f - 0x1p-23f,
                                1e30f,
                                INFINITY,
                                -INFINITY};
  const std::vector<float> want = {0.0f,           1.0f, 1.0f + ulp,   1.0f,     -1.0f - ulp,
                                   1.0f + 2 * ulp, 2.0f, 0x1.93cp+99f, INFINITY, -INFINITY};
  Array<float> in(x), out(x.size());
  launch_kernel({"to_tf32", 1, static_cast<int>(x.size())}, &to_tf32_kernel, in.get(), out.get());
  auto got = out.read();
  expect(std::abs(got[7] / 1e30f - 1.0f) <= ulp / 2, "to_tf32 of 1e30");
  got[7] = want[7];
  expect_equal(got, want, "to_tf32");
});

}  // namespace
}  // namespace testing
}  // namespace fastconv
