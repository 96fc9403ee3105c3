// TMA: every byte of shared memory after a load, and of global memory after a store, against plain
// loops. Tensors exceed 128 KiB: for smaller ones some drivers set a map up differently.
#include <algorithm>

#include "cases.h"
#include "cuda/ptx/cluster.h"
#include "cuda/ptx/fence.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/tma.h"
#include "cuda/tensor_map.h"

namespace fastconv {
namespace testing {
namespace {

using cuda::Im2colMap;
using cuda::launch_kernel;
using cuda::shared_memory;
using cuda::SharedCarver;
using cuda::TiledMap;

constexpr int kThreads = 64;
constexpr int kPatternBytes = 1024;  // of a 128-byte swizzle

struct Position {
  int at[5];
};

// The byte of a box's shared memory where its byte `i` lies.
int64_t swizzled(int64_t i, CUtensorMapSwizzle swizzle) {
  const int64_t units = std::max(1, cuda::row_bytes(swizzle) / 16);
  return i ^ (i / 128 % units * 16);
}

struct Memory {
  uint64_t* barriers;
  unsigned char* box;
  __host__ __device__ Memory(SharedCarver& carve, int bytes)
      : barriers(carve.take<uint64_t>(1, ptx::kMbarrierBytes)),
        box(carve.take<unsigned char>(bytes, kPatternBytes)) {}
};

template <class Load>
__device__ void load_box(unsigned char* out, int bytes, Load&& load) {
  SharedCarver carve(shared_memory());
  Memory memory(carve, bytes);
  const uint32_t full = ptx::shared_address(memory.barriers);
  const uint32_t box = ptx::shared_address(memory.box);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(full, static_cast<uint32_t>(bytes));
    load(box, full);
  }
  __syncthreads();
  ptx::mbarrier_wait(full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes; i += kThreads) out[i] = memory.box[i];
}

template <int kRank>
__global__ void load_kernel(const __grid_constant__ CUtensorMap map, Position position, int bytes,
                            unsigned char* out) {
  load_box(out, bytes, [&](uint32_t box, uint32_t full) {
    int at[kRank];
    for (int i = 0; i < kRank; ++i) at[i] = position.at[i];
    ptx::tma_prefetch_map(&map);
    ptx::tma_load(box, &map, full, at);
  });
}

__global__ void im2col_kernel(const __grid_constant__ CUtensorMap map, ptx::Im2colPosition at,
                              int bytes, unsigned char* out) {
  load_box(out, bytes,
           [&](uint32_t box, uint32_t full) { ptx::tma_load_im2col(box, &map, full, at); });
}

__global__ void bulk_kernel(const unsigned char* from, int bytes, unsigned char* out) {
  load_box(out, bytes, [&](uint32_t box, uint32_t full) {
    ptx::bulk_load(box, from, static_cast<uint32_t>(bytes), full);
  });
}

int64_t shared_bytes(int bytes) {
  SharedCarver carve;
  Memory memory(carve, bytes);
  return carve.bytes();
}

// What lies in shared memory after a load, from value(row, element of the row).
template <class T, class Value>
std::vector<unsigned char> expected(int rows, int columns, CUtensorMapSwizzle swizzle,
                                    Value&& value) {
  const int element = static_cast<int>(sizeof(T));
  std::vector<unsigned char> bytes(static_cast<size_t>(rows) * columns * element);
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) {
      const T x = value(row, column);
      memcpy(&bytes[swizzled((row * columns + column) * element, swizzle)], &x, sizeof(T));
    }
  }
  return bytes;
}

template <class T>
struct Tensor {
  std::vector<int64_t> sizes, strides;  // innermost first
  std::vector<T> values;

  Tensor(std::vector<int64_t> s, uint64_t seed, int64_t padding = 0) : sizes(std::move(s)) {
    int64_t stride = 1;
    for (size_t i = 0; i < sizes.size(); ++i) {
      strides.push_back(stride);
      stride *= sizes[i] + (i == 0 ? padding : 0);
    }
    values.resize(static_cast<size_t>(stride));
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = T(static_cast<float>((i + seed) % 251 + 1));
    }
  }
  T at(const std::vector<int64_t>& where) const {
    int64_t index = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (where[i] < 0 || where[i] >= sizes[i]) return T(0.0f);
      index += where[i] * strides[i];
    }
    return values[static_cast<size_t>(index)];
  }
};

template <class T, int kRank>
void load_case(uint64_t seed, std::vector<int64_t> sizes, std::vector<int> box,
               std::vector<int> steps, CUtensorMapSwizzle swizzle, Position position) {
  const Tensor<T> tensor(std::move(sizes), seed, 16 / static_cast<int64_t>(sizeof(T)));
  Array<T> in(tensor.values);
  TiledMap map = {cuda::kMapType<T>, in.get(), kRank, {}, {}, {}};
  int rows = 1;
  std::vector<int> counts;
  for (int i = 0; i < kRank; ++i) {
    map.sizes[i] = tensor.sizes[i];
    map.strides[i] = tensor.strides[i];
    map.box[i] = box[i];
    map.steps[i] = steps[i];
    counts.push_back((box[i] + steps[i] - 1) / steps[i]);
    if (i > 0) rows *= counts[i];
  }
  map.swizzle = swizzle;
  const auto want = expected<T>(rows, box[0], swizzle, [&](int row, int column) {
    std::vector<int64_t> where = {position.at[0] + column};
    for (int i = 1; i < kRank; ++i) {
      where.push_back(position.at[i] + row % counts[i] * steps[i]);
      row /= counts[i];
    }
    return tensor.at(where);
  });
  Array<unsigned char> out(want.size());
  const int bytes = static_cast<int>(want.size());
  launch_kernel({"tma_load", 1, kThreads, nullptr, shared_bytes(bytes)}, &load_kernel<kRank>,
                cuda::encode(map), position, bytes, out.get());
  expect_equal(out.read(), want, "tiled load of rank " + std::to_string(kRank));
}

using Bf16 = __nv_bfloat16;
constexpr auto kPlain = CU_TENSOR_MAP_SWIZZLE_NONE;
constexpr auto k32 = CU_TENSOR_MAP_SWIZZLE_32B;
constexpr auto k64 = CU_TENSOR_MAP_SWIZZLE_64B;
constexpr auto k128 = CU_TENSOR_MAP_SWIZZLE_128B;

const Register load_2d("tma_load_2d", [](uint64_t seed) {
  for (const Position at : {Position{{64, 8}}, Position{{-8, -3}}, Position{{360, 190}}}) {
    load_case<Bf16, 2>(seed, {376, 200}, {64, 20}, {1, 1}, k128, at);
    load_case<Bf16, 2>(seed, {376, 200}, {32, 40}, {1, 1}, k64, at);
    load_case<Bf16, 2>(seed, {376, 200}, {16, 40}, {1, 1}, k32, at);
    load_case<Bf16, 2>(seed, {376, 200}, {72, 24}, {1, 1}, kPlain, at);
    load_case<float, 2>(seed, {376, 200}, {32, 20}, {1, 1}, k128, at);
    load_case<float, 2>(seed, {376, 200}, {12, 20}, {1, 2}, kPlain, at);
  }
});
const Register load_nd("tma_load_3d_4d_5d", [](uint64_t seed) {
  load_case<Bf16, 3>(seed, {72, 30, 40}, {64, 5, 3}, {1, 1, 1}, k128, {{16, 27, -1}});
  load_case<Bf16, 4>(seed, {40, 20, 10, 12}, {32, 3, 4, 2}, {1, 1, 2, 1}, k64, {{16, -1, 7, 11}});
  load_case<float, 5>(seed, {12, 10, 9, 8, 7}, {8, 3, 2, 2, 3}, {1, 1, 1, 1, 1}, k32,
                      {{8, 8, -1, 7, 5}});
});

// ---- im2col ----

struct Im2colShape {
  int C, W, H, N, S, R, pad_w, pad_h, stride_w, stride_h, dil_w, dil_h;
};

// The pixels of one tap: windows (n, p, q) from number `first` on.
template <class T>
void im2col_case(uint64_t seed, const Im2colShape& t, int channels, int pixels,
                 CUtensorMapSwizzle swizzle, int first, int c, int r, int s) {
  const Tensor<T> tensor({t.C, t.W, t.H, t.N}, seed);
  Array<T> in(tensor.values);
  const int Q = (t.W + 2 * t.pad_w - (t.S - 1) * t.dil_w - 1) / t.stride_w + 1;
  const int P = (t.H + 2 * t.pad_h - (t.R - 1) * t.dil_h - 1) / t.stride_h + 1;
  Im2colMap map = {cuda::kMapType<T>,
                   in.get(),
                   {t.C, t.W, t.H, t.N},
                   {1, t.C, int64_t{t.W} * t.C, int64_t{t.H} * t.W * t.C},
                   {-t.pad_w, -t.pad_h},
                   {t.pad_w - (t.S - 1) * t.dil_w, t.pad_h - (t.R - 1) * t.dil_h},
                   {t.stride_w, t.stride_h},
                   channels,
                   pixels,
                   swizzle};
  const auto want = expected<T>(pixels, channels, swizzle, [&](int pixel, int channel) {
    const int window = first + pixel, n = window / (P * Q), p = window / Q % P, q = window % Q;
    return tensor.at({c + channel, q * t.stride_w - t.pad_w + s * t.dil_w,
                      p * t.stride_h - t.pad_h + r * t.dil_h, n});
  });
  Array<unsigned char> out(want.size());
  const int n = first / (P * Q), p = first / Q % P, q = first % Q;
  const ptx::Im2colPosition at = {
      c, q * t.stride_w - t.pad_w,           p * t.stride_h - t.pad_h,
      n, static_cast<uint16_t>(s * t.dil_w), static_cast<uint16_t>(r * t.dil_h)};
  const int bytes = static_cast<int>(want.size());
  launch_kernel({"im2col", 1, kThreads, nullptr, shared_bytes(bytes)}, &im2col_kernel,
                cuda::encode(map), at, bytes, out.get());
  expect_equal(out.read(), want, "im2col load");
}

const Register im2col("tma_load_im2col", [](uint64_t seed) {
  const Im2colShape same = {72, 14, 13, 6, 3, 3, 1, 1, 1, 1, 1, 1};
  const Im2colShape strided = {72, 15, 12, 6, 3, 5, 2, 3, 2, 3, 2, 1};
  for (int r = 0; r < 3; ++r) {
    for (int s = 0; s < 3; ++s) im2col_case<Bf16>(seed, same, 64, 50, k128, 150, 0, r, s);
  }
  im2col_case<Bf16>(seed, same, 64, 64, k128, 14 * 13 * 6 - 10, 64, 2, 1);  // beyond C and N
  im2col_case<Bf16>(seed, strided, 32, 70, k64, 3, 32, 4, 2);
  im2col_case<Bf16>(seed, strided, 16, 70, k32, 20, 64, 0, 0);
  im2col_case<float>(seed, strided, 40, 30, kPlain, 11, 0, 1, 1);
});

// ---- the rest ----

const Register bulk("bulk_load", [](uint64_t seed) {
  std::vector<unsigned char> from(4096);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<unsigned char>(i * 7 + seed);
  Array<unsigned char> in(from), out(1040);
  launch_kernel({"bulk", 1, kThreads, nullptr, shared_bytes(1040)}, &bulk_kernel, in.get() + 48,
                1040, out.get());
  expect_equal(out.read(), std::vector<unsigned char>(from.begin() + 48, from.begin() + 1088),
               "cp.async.bulk");
});

constexpr int kStoreRows = 20, kStoreColumns = 64;

// Writes numbers to shared memory where the swizzle has them, and stores the box.
__global__ void store_kernel(const __grid_constant__ CUtensorMap map, int x, int y) {
  SharedCarver carve(shared_memory());
  Memory memory(carve, kStoreRows * kStoreColumns * 2);
  for (int i = static_cast<int>(threadIdx.x); i < kStoreRows * kStoreColumns; i += kThreads) {
    const int byte = 2 * i;
    *reinterpret_cast<Bf16*>(memory.box + (byte ^ (byte / 128 % 8 * 16))) =
        __float2bfloat16_rn(static_cast<float>(i % 251 + 1));
  }
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store(&map, ptx::shared_address(memory.box), {x, y});
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
  }
}

const Register store("tma_store", [](uint64_t) {
  constexpr int kWidth = 376, kHeight = 200;
  for (const Position at : {Position{{64, 8}}, Position{{-8, -3}}, Position{{360, 190}}}) {
    Array<Bf16> out(std::vector<Bf16>(kWidth * kHeight, Bf16(0.0f)));
    std::vector<Bf16> want(kWidth * kHeight, Bf16(0.0f));
    for (int i = 0; i < kStoreRows * kStoreColumns; ++i) {
      const int x = at.at[0] + i % kStoreColumns, y = at.at[1] + i / kStoreColumns;
      if (x < 0 || x >= kWidth || y < 0 || y >= kHeight) continue;
      want[y * kWidth + x] = Bf16(static_cast<float>(i % 251 + 1));
    }
    const TiledMap map = {
        cuda::kMapType<Bf16>,        out.get(), 2,   {kWidth, kHeight}, {1, kWidth},
        {kStoreColumns, kStoreRows}, {1, 1},    k128};
    launch_kernel({"tma_store", 1, kThreads, nullptr, shared_bytes(kStoreRows * kStoreColumns * 2)},
                  &store_kernel, cuda::encode(map), at.at[0], at.at[1]);
    expect_equal(out.read(), want, "tiled store");
  }
});

// Outside is NaN.
const Register nan_fill("tma_load_nan_outside", [](uint64_t seed) {
  const Tensor<Bf16> tensor({64, 1100}, seed);
  Array<Bf16> in(tensor.values);
  const TiledMap map = {
      cuda::kMapType<Bf16>, in.get(), 2, {64, 1100}, {1, 64}, {64, 4}, {1, 1}, k128, true};
  Array<unsigned char> out(4 * 128);
  launch_kernel({"tma_load", 1, kThreads, nullptr, shared_bytes(512)}, &load_kernel<2>,
                cuda::encode(map), Position{{0, -2}}, 512, out.get());
  const auto got = out.read();
  for (int i = 0; i < 256; ++i) {
    Bf16 x;
    memcpy(&x, &got[swizzled(2 * i, k128)], 2);
    const bool is_nan = static_cast<float>(x) != static_cast<float>(x);
    expect(is_nan == (i < 128), "element " + std::to_string(i) + " is or is not NaN");
  }
});

// Each block of a cluster loads a part and gives it to all of them.
constexpr int kCluster = 2, kPartRows = 8;
__global__ void multicast_kernel(const __grid_constant__ CUtensorMap map, Bf16* out) {
  constexpr int kBytes = kCluster * kPartRows * 128;
  SharedCarver carve(shared_memory());
  Memory memory(carve, kBytes);
  const uint32_t full = ptx::shared_address(memory.barriers);
  const uint32_t box = ptx::shared_address(memory.box);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(full, kBytes);
  }
  ptx::cluster_sync();
  if (threadIdx.x == 0) {
    const int part = static_cast<int>(ptx::cluster_rank());
    ptx::tma_load_multicast(box + part * kPartRows * 128, &map, full, (1 << kCluster) - 1,
                            {0, part * kPartRows});
  }
  ptx::mbarrier_wait(full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < kBytes / 2; i += kThreads) {
    out[blockIdx.x * kBytes / 2 + i] = reinterpret_cast<const Bf16*>(memory.box)[i];
  }
  ptx::cluster_sync();
}

const Register multicast("tma_load_multicast", [](uint64_t seed) {
  const Tensor<Bf16> tensor({64, 1100}, seed);
  Array<Bf16> in(tensor.values);
  const TiledMap map = {cuda::kMapType<Bf16>, in.get(), 2, {64, 1100}, {1, 64}, {64, kPartRows}};
  constexpr int kElements = kCluster * kPartRows * 64;
  std::vector<Bf16> want;
  for (int block = 0; block < kCluster; ++block) {
    want.insert(want.end(), tensor.values.begin(), tensor.values.begin() + kElements);
  }
  Array<Bf16> out(want.size());
  launch_kernel({"multicast", kCluster, kThreads, nullptr, shared_bytes(kElements * 2), kCluster},
                &multicast_kernel, cuda::encode(map), out.get());
  expect_equal(out.read(), want, "multicast");
});

// What the host refuses, with the value that is wrong.
const Register refusals("tensor_map_refusals", [](uint64_t) {
  Array<Bf16> in(64 * 1100);
  const TiledMap good = {
      cuda::kMapType<Bf16>, in.get(), 2, {64, 1100}, {1, 64}, {64, 8}, {1, 1}, k128};
  cuda::encode(good);
  TiledMap map = good;
  map.box[1] = 300;
  expect_throws("the box of dimension 1 is 300", [&] { cuda::encode(map); });
  map = good;
  map.strides[1] = 68;
  expect_throws("the stride in bytes of dimension 1 is 136", [&] { cuda::encode(map); });
  map = good;
  map.box[0] = 32;
  expect_throws("under this swizzle is 64", [&] { cuda::encode(map); });
  map = good;
  map.base = in.get() + 1;
  expect_throws("no multiple of 16", [&] { cuda::encode(map); });
  const Im2colMap window = {cuda::kMapType<Bf16>,
                            in.get(),
                            {64, 10, 11, 10},
                            {1, 64, 640, 7040},
                            {-1, -1},
                            {-1, -1},
                            {1, 1},
                            64,
                            64,
                            k128};
  cuda::encode(window);
  Im2colMap wrong = window;
  wrong.lower[1] = -129;
  expect_throws("lower corner of dimension 2 is -129", [&] { cuda::encode(wrong); });
  wrong = window;
  wrong.steps[0] = 9;
  expect_throws("the step of dimension 1 is 9", [&] { cuda::encode(wrong); });
  wrong = window;
  wrong.pixels = 1025;
  expect_throws("pixels a column is 1025", [&] { cuda::encode(wrong); });
  wrong = window;
  wrong.upper[0] = -12;
  expect_throws("bounding box's extent of dimension 1 is -1", [&] { cuda::encode(wrong); });
});

}  // namespace
}  // namespace testing
}  // namespace fastconv
