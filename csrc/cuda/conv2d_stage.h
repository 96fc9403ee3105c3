// The way of a tile's results from float32 sums in shared memory to global memory: epilogue, one
// rounding, wide stores along whichever of channels and pixels lies innermost; and each channel's
// (mean, M2) over the tile for a BatchNorm that follows.
#pragma once

#include <cstring>

#include "cuda/conv2d.h"
#include "cuda/conv2d_statistics.h"

namespace fastconv {
namespace cuda {

// Floats in a row of staged sums: at least 4 more than the columns, and 4 more than a multiple of
// 32. Rows are then 16-byte aligned, and eight lanes that read 16 bytes each meet every bank once,
// whether they stand side by side in a row or one below the other.
FASTCONV_HOST_DEVICE constexpr int stage_pitch(int cols) { return (cols + 31) / 32 * 32 + 4; }
FASTCONV_HOST_DEVICE constexpr int64_t stage_floats(int rows, int cols) {
  return int64_t{rows} * stage_pitch(cols);
}

// Sums [kRows][kCols] in shared memory, stage_pitch(kCols) floats a row, 16-byte aligned. Row: a
// pixel; column: a filter.
struct StagedTile {
  float* sums;
  const int64_t* offsets;  // [kRows] of the row's pixel in `out`, without its channel; -1: none
  int first_k;             // column 0's channel in scale, shift, `out`
  int filters;             // columns that exist, from 0 on; <= kCols
};

// Where store_tile() writes.
struct StageTarget {
  EpilogueParams epilogue;
  void* out;
  int64_t channel_stride;  // of out and the residual, in elements
  int channels;            // of out: K, or in dgrad C
  bool vector;             // channel_stride 1; out, residual and every offset allow 16-byte packs
  float* partials;         // null, or [tile][K][2] of conv2d_statistics.h
};

// The target of fprop, and of dgrad. `partials` as above.
inline StageTarget stage_target(const EpilogueParams& epilogue, void* out, const Strides4& strides,
                                int64_t channels, int64_t channels_per_group, DType dtype) {
  StageTarget t = {epilogue, out, strides.c, to_int(channels), false, nullptr};
  // With packs of channels a group and neighbouring channels, all other strides are packs too.
  t.vector = strides.c == 1 && channels_per_group * size_of(dtype) % kPackBytes == 0 &&
             is_aligned(out, kPackBytes) && is_aligned(epilogue.residual, kPackBytes);
  return t;
}
inline StageTarget fprop_target(const Conv2dProblem& p, const Conv2dArgs& args,
                                float* partials = nullptr) {
  StageTarget t = stage_target(epilogue_params_of(p.epilogue, args), args.out,
                               dense_strides(p.layout, p.K, p.P(), p.Q()), p.K, p.K / p.G, p.dtype);
  t.partials = partials;
  return t;
}
inline StageTarget dgrad_target(const Conv2dProblem& p, const Conv2dArgs& args) {
  return stage_target({}, args.out, dense_strides(p.layout, p.C, p.H, p.W), p.C, p.C / p.G,
                      p.dtype);
}

// ---- The epilogue of a few numbers ---------------------------------------------------------

// activate() of each, the choice made once: the loops stay free of branches.
template <Activation kActivation, int kCount>
__device__ inline void activate_as(float (&z)[kCount], float slope) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) z[i] = activate(z[i], kActivation, slope);
}
template <int kCount>
__device__ inline void activate_all(float (&z)[kCount], const EpilogueParams& e) {
  const float slope = static_cast<float>(e.slope);
  switch (e.activation) {
    case Activation::kNone:
      return;
    case Activation::kReLU:
      return activate_as<Activation::kReLU>(z, slope);
    case Activation::kReLU6:
      return activate_as<Activation::kReLU6>(z, slope);
    case Activation::kLeakyReLU:
      return activate_as<Activation::kLeakyReLU>(z, slope);
    case Activation::kSiLU:
      return activate_as<Activation::kSiLU>(z, slope);
    case Activation::kHardSwish:
      return activate_as<Activation::kHardSwish>(z, slope);
    case Activation::kSigmoid:
      return activate_as<Activation::kSigmoid>(z, slope);
  }
}

// Scale and shift of kCount neighbouring channels from k on, of which `count` exist. Without: 1 and
// -0, which change no number, -0 among them.
template <int kCount>
struct ChannelFactors {
  float scale[kCount], shift[kCount];

  __device__ ChannelFactors(const EpilogueParams& e, int k, int count) {
    const float* scales = static_cast<const float*>(e.scale);
    const float* shifts = static_cast<const float*>(e.shift);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scale[i] = scales != nullptr && i < count ? scales[k + i] : 1.0f;
      shift[i] = shifts != nullptr && i < count ? shifts[k + i] : -0.0f;
    }
  }
};

// z = scale * z + shift + residual, activated: core/epilogue.h.
template <class T, int kCount>
__device__ inline void apply_epilogue(const EpilogueParams& e, const ChannelFactors<kCount>& k,
                                      const Pack<T, kCount>& residual, float (&z)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    z[i] = z[i] * k.scale[i] + k.shift[i];
    if (e.residual != nullptr) z[i] += widen(residual.at[i]);
  }
  activate_all(z, e);
}

// ---- Statistics ----------------------------------------------------------------------------

// Mean and M2 of one thread's rows of kCount channels. The first number is the pivot: it lies where
// the others do, so that neither sum cancels.
template <int kCount>
struct Moments {
  float pivot[kCount] = {}, first[kCount] = {}, second[kCount] = {};
  int count = 0;

  __device__ void add(const float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      pivot[i] = count == 0 ? x[i] : pivot[i];
      const float d = x[i] - pivot[i];
      first[i] += d;
      second[i] += d * d;
    }
    ++count;
  }
};

// ---- A tile --------------------------------------------------------------------------------

// What neighbouring lanes store.
enum class Lanes {
  kPacks,     // 16 bytes each of a pixel's channels: eight lanes fill a line of 128
  kChannels,  // neighbouring channels of a pixel
  kPixels,  // neighbouring pixels: 64 bytes of a warp's 16-bit ones, which is all that an SM hands
            // to L2 in a cycle
};

template <class T, int kRows, int kCols, int kThreads>
class TileStore {
 public:
  static constexpr int kPack = kPackSize<T>;

  __device__ TileStore(const StagedTile& from, const StageTarget& to, int thread)
      : from_(from),
        to_(to),
        thread_(thread),
        row_(thread / kPacks),
        col_(thread % kPacks * kPack),
        has_pack_(col_ < from.filters) {}

  // Lanes::kPacks. A thread keeps its channels: it has every kStep-th row from row_ on.
  __device__ void store_packs(bool statistics, Moments<kPack>& moments) const {
    if (!has_pack_) return;
    const int k = from_.first_k + col_;
    const ChannelFactors<kPack> factors(to_.epilogue, k, kPack);
    const T* residual = static_cast<const T*>(to_.epilogue.residual);
    T* out = static_cast<T*>(to_.out) + k;
    // As words, since nvcc would take a queue of 16-bit numbers apart.
    using Words = Pack<uint32_t, kPackBytes / 4>;
    const auto load_residual = [&](int round) {
      const int64_t pixel = round < kRounds ? offset_of_row(round) : -1;
      if (pixel < 0) return Words{};
      return *reinterpret_cast<const Words*>(residual + k + pixel);
    };
    Words coming[kAhead] = {};
    if (residual != nullptr) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) coming[i] = load_residual(i);
    }
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      Pack<T, kPack> values;  // the residual's, where there is one
      if (residual != nullptr) {
        memcpy(&values, &coming[0], sizeof(values));
#pragma unroll
        for (int i = 1; i < kAhead; ++i) coming[i - 1] = coming[i];
        coming[kAhead - 1] = load_residual(round + kAhead);
      }
      const int64_t pixel = offset_of_row(round);
      if (pixel < 0) continue;
      float z[kPack];
      load_sums(round, z);
      apply_epilogue<T>(to_.epilogue, factors, values, z);
#pragma unroll
      for (int i = 0; i < kPack; ++i) values.at[i] = narrow<T>(z[i]);
      store_pack(out + pixel, values);
      if (!statistics) continue;
#pragma unroll
      for (int i = 0; i < kPack; ++i) z[i] = widen(values.at[i]);
      moments.add(z);
    }
  }

  // Lanes::kChannels, or kPixels with four channels a thread, whose sums are one load. `keep`: the
  // rounded numbers take the sums' place.
  template <Lanes kLanes>
  __device__ void store_elements(bool keep) const {
    constexpr int kCount = kLanes == Lanes::kPixels ? 4 : 1;
    constexpr int kPieces = kRows * kCols / kCount;
    const T* residual = static_cast<const T*>(to_.epilogue.residual);
    Pack<T, kCount> coming[kAhead] = {};
    if (residual != nullptr) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load_elements(piece_at<kLanes>(i), coming[i]);
    }
#pragma unroll 1
    for (int round = 0; round * kThreads < kPieces; ++round) {
      Pack<T, kCount> values = coming[0];
      if (residual != nullptr) {
#pragma unroll
        for (int i = 1; i < kAhead; ++i) coming[i - 1] = coming[i];
        load_elements(piece_at<kLanes>(round + kAhead), coming[kAhead - 1]);
      }
      const Piece piece = piece_at<kLanes>(round);
      if (piece.count <= 0) continue;
      float* sums = from_.sums + piece.row * kPitch + piece.col;
      const Pack<float, kCount> staged = load_pack<float, kCount>(sums);
      float z[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) z[i] = staged.at[i];
      const ChannelFactors<kCount> factors(to_.epilogue, from_.first_k + piece.col, piece.count);
      apply_epilogue<T>(to_.epilogue, factors, values, z);
      Pack<float, kCount> rounded;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        values.at[i] = narrow<T>(z[i]);
        rounded.at[i] = widen(values.at[i]);
        if (i < piece.count) {
          static_cast<T*>(to_.out)[piece.offset + i * to_.channel_stride] = values.at[i];
        }
      }
      if (keep) store_pack(sums, rounded);
    }
  }

  // The moments of the rounded numbers in the tile, with the threads as in store_packs().
  __device__ void add_rounded(Moments<kPack>& moments) const {
    if (!has_pack_) return;
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      if (offset_of_row(round) < 0) continue;
      float z[kPack];
      load_sums(round, z);
      moments.add(z);
    }
  }

  // A thread's moments go where it alone has read: into its first two rows. The counts go behind
  // the columns.
  __device__ void put(const Moments<kPack>& moments) const {
    float* means = from_.sums + row_ * kPitch;
    if (col_ == 0) means[kCols] = static_cast<float>(moments.count);
    if (moments.count == 0) return;
    const float share = 1.0f / static_cast<float>(moments.count);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float beyond_pivot = moments.first[i] * share;
      const float m2 = moments.second[i] - moments.first[i] * beyond_pivot;
      means[col_ + i] = moments.pivot[i] + beyond_pivot;
      means[kStep * kPitch + col_ + i] = m2 < 0 ? 0.0f : m2;
    }
  }

  // Chan's formula over the threads of each channel, in order.
  __device__ void merge(int64_t tile) const {
#pragma unroll 1
    for (int col = thread_; col < from_.filters; col += kThreads) {
      float count = 0, mean = 0, m2 = 0;
#pragma unroll 1
      for (int row = 0; row < kStep; ++row) {
        const float* at = from_.sums + row * kPitch;
        const float other = at[kCols];
        if (other == 0) continue;
        const float share = other / (count + other), delta = at[col] - mean;
        mean += delta * share;
        m2 += at[kStep * kPitch + col] + delta * delta * (count * share);
        count += other;
      }
      float* to = to_.partials + (tile * to_.channels + from_.first_k + col) * 2;
      store_pack(to, Pack<float, 2>{{mean, m2}});
    }
  }

 private:
  static constexpr int kPitch = stage_pitch(kCols);
  static constexpr int kPacks = kCols / kPack;     // a row
  static constexpr int kStep = kThreads / kPacks;  // rows of which the threads have a pack each
  static constexpr int kRounds = kRows / kStep;
  static constexpr int kAhead = 3;  // residuals on their way: a load takes some 600 cycles
  static_assert(kCols % kPack == 0 && kThreads % kPacks == 0, "a thread keeps its channels");
  static_assert(kRows % kStep == 0 && kRounds >= 2, "put() needs two rows a thread");

  __device__ int64_t offset_of_row(int round) const { return from_.offsets[row_ + round * kStep]; }

  // A thread's pack of sums, 16 bytes at a time. Eight sums are two such loads, and eight lanes
  // side by side would meet the same half of the banks: four take their second half first.
  __device__ void load_sums(int round, float (&z)[kPack]) const {
    const float* at = from_.sums + (row_ + round * kStep) * kPitch + col_;
    const bool swapped = kPack == 8 && kPacks >= 8 && (thread_ & 4) != 0;
    const Pack<float, 4> one = load_pack<float, 4>(at + (swapped ? 4 : 0));
    Pack<float, 4> two = one;
    if constexpr (kPack == 8) two = load_pack<float, 4>(at + (swapped ? 0 : 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      z[i] = swapped ? two.at[i] : one.at[i];
      if constexpr (kPack == 8) z[4 + i] = swapped ? one.at[i] : two.at[i];
    }
  }

  // What store_elements() takes at once: channels of a pixel.
  struct Piece {
    int row, col, count;  // count <= 0: nothing
    int64_t offset;       // of its first element in out
  };
  template <Lanes kLanes>
  __device__ Piece piece_at(int round) const {
    const unsigned i = static_cast<unsigned>(thread_ + round * kThreads);
    const unsigned row = kLanes == Lanes::kPixels ? i % kRows : i / kCols;
    const unsigned col = kLanes == Lanes::kPixels ? i / kRows * 4 : i % kCols;
    Piece piece = {static_cast<int>(row), static_cast<int>(col), 0, 0};
    if (row >= kRows || col >= kCols) return piece;
    const int64_t pixel = from_.offsets[row];
    if (pixel >= 0) piece.count = from_.filters - piece.col;
    piece.offset = pixel + (from_.first_k + piece.col) * to_.channel_stride;
    return piece;
  }
  template <int kCount>
  __device__ void load_elements(const Piece& piece, Pack<T, kCount>& values) const {
    const T* residual = static_cast<const T*>(to_.epilogue.residual) + piece.offset;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < piece.count) values.at[i] = residual[i * to_.channel_stride];
    }
  }

  const StagedTile& from_;
  const StageTarget& to_;
  const int thread_;
  const int row_, col_;  // of the thread's first pack
  const bool has_pack_;
};

// Stores a tile's results, rounded to T (float, __half, __nv_bfloat16), and its part of the
// statistics. kThreads threads call it, `thread` being 0 to kThreads - 1: a block, or a warpgroup.
// They have synchronised since the sums and offsets were written, and do so again before they
// write them anew. sync() is a barrier of just these threads, called only with partials: then the
// sums are overwritten.
template <class T, int kRows, int kCols, int kThreads, class Sync>
__device__ inline void store_tile(const StagedTile& from, const StageTarget& to, int64_t tile,
                                  int thread, Sync&& sync) {
  using Store = TileStore<T, kRows, kCols, kThreads>;
  const Store store(from, to, thread);
  const bool statistics = to.partials != nullptr;
  Moments<Store::kPack> moments;
  if (to.vector) {
    store.store_packs(statistics, moments);
  } else if (to.channel_stride == 1) {
    store.template store_elements<Lanes::kChannels>(statistics);
  } else {
    store.template store_elements<Lanes::kPixels>(statistics);
  }
  if (!statistics) return;
  if (!to.vector) {
    sync();
    store.add_rounded(moments);
  }
  store.put(moments);
  sync();
  store.merge(tile);
}

}  // namespace cuda
}  // namespace fastconv
