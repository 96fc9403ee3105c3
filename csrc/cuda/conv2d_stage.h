// The way of a tile's results from float32 sums in shared memory to global memory: epilogue, one
// rounding, wide stores along whichever of channels and pixels lies innermost; and each channel's
// (mean, M2) over the tile for a BatchNorm that follows.
#pragma once

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

// The tile falls into pieces of kCount channels of a pixel; the threads take the next kThreads of
// them together.
//   kPacks     16 bytes of out: eight lanes side by side store a 128-byte line of a pixel's
//              channels. A thread's pieces all have the same channels.
//   kChannels  one channel: neighbouring lanes store neighbouring channels of a pixel.
//   kPixels    4 channels: neighbouring lanes store neighbouring pixels of each.
enum class Pieces { kPacks, kChannels, kPixels };

template <class T, int kRows, int kCols, int kThreads>
class TileStore {
 public:
  static constexpr int kPack = kPackSize<T>;
  template <Pieces kPieces>
  static constexpr int kCountOf = kPieces == Pieces::kPacks    ? kPack
                                  : kPieces == Pieces::kPixels ? 4
                                                               : 1;

  __device__ TileStore(const StagedTile& from, const StageTarget& to, int thread)
      : from_(from), to_(to), thread_(thread) {}

  // Stores every piece. Of packs the moments are taken on the way, if wanted; else the rounded
  // numbers take the sums' place.
  template <Pieces kPieces>
  __device__ void store_pieces(bool statistics, Moments<kPack>& moments) const {
    constexpr int kCount = kCountOf<kPieces>;
    constexpr int kRounds = (kRows * kCols / kCount + kThreads - 1) / kThreads;
    // The residuals of the next pieces are on their way: a load takes some 600 cycles.
    Pack<T, kCount> residuals[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) residuals[i] = load_residual<kPieces>(i);
    ChannelFactors<kCount> factors(to_.epilogue, from_.first_k + col<kPieces>(0),
                                   from_.filters - col<kPieces>(0));
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      Pack<T, kCount> values = residuals[0];
#pragma unroll
      for (int i = 1; i < kAhead; ++i) residuals[i - 1] = residuals[i];
      residuals[kAhead - 1] = load_residual<kPieces>(round + kAhead);
      const int64_t offset = offset_of_piece<kPieces>(round);
      if (offset < 0) continue;

      float* at = from_.sums + row<kPieces>(round) * kPitch + col<kPieces>(round);
      const int count = from_.filters - col<kPieces>(round);
      if constexpr (kPieces != Pieces::kPacks) {
        factors = {to_.epilogue, from_.first_k + col<kPieces>(round), count};
      }
      float z[kCount];
      load_sums(at, z);
      apply_epilogue<T>(to_.epilogue, factors, values, z);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        values.at[i] = narrow<T>(z[i]);
        z[i] = widen(values.at[i]);
      }
      store_piece<kPieces>(offset, count, values);
      if (!statistics) continue;
      if constexpr (kPieces == Pieces::kPacks) {
        moments.add(z);
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) at[i] = z[i];
      }
    }
  }

  // The moments of the rounded numbers in the tile.
  __device__ void add_rounded(Moments<kPack>& moments) const {
    constexpr Pieces kPieces = Pieces::kPacks;
#pragma unroll 1
    for (int round = 0; round * kStep < kRows; ++round) {
      if (offset_of_piece<kPieces>(round) < 0) continue;
      float z[kPack];
      load_sums(from_.sums + row<kPieces>(round) * kPitch + col<kPieces>(round), z);
      moments.add(z);
    }
  }

  // A thread's moments go where it alone has read: into its first two rows. The counts go behind
  // the columns.
  __device__ void put(const Moments<kPack>& moments) const {
    const int first_row = row<Pieces::kPacks>(0), first_col = col<Pieces::kPacks>(0);
    float* means = from_.sums + first_row * kPitch;
    if (first_col == 0) means[kCols] = static_cast<float>(moments.count);
    if (moments.count == 0) return;
    const float share = 1.0f / static_cast<float>(moments.count);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float beyond_pivot = moments.first[i] * share;
      const float m2 = moments.second[i] - moments.first[i] * beyond_pivot;
      means[first_col + i] = moments.pivot[i] + beyond_pivot;
      means[kStep * kPitch + first_col + i] = m2 < 0 ? 0.0f : m2;
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
  static constexpr int kStep = kThreads / (kCols / kPack);  // rows that the threads' packs are
  static constexpr int kAhead = 3;
  static_assert(kCols % kPack == 0 && kThreads % (kCols / kPack) == 0, "a thread's channels");
  static_assert(2 * kStep <= kRows, "put() needs two rows a thread");

  template <Pieces kPieces>
  __device__ int row(int round) const {
    const int piece = thread_ + round * kThreads;
    return kPieces == Pieces::kPixels ? piece % kRows : piece / (kCols / kCountOf<kPieces>);
  }
  template <Pieces kPieces>
  __device__ int col(int round) const {
    constexpr int kCount = kCountOf<kPieces>;
    const int piece = thread_ + round * kThreads;
    if (kPieces == Pieces::kPacks) return thread_ % (kCols / kPack) * kPack;
    return kPieces == Pieces::kPixels ? piece / kRows * kCount : piece % (kCols / kCount) * kCount;
  }

  // Of the piece's first element in out; -1 where there is none.
  template <Pieces kPieces>
  __device__ int64_t offset_of_piece(int round) const {
    const int at = row<kPieces>(round), channel = col<kPieces>(round);
    if (at >= kRows || channel >= from_.filters) return -1;
    const int64_t pixel = from_.offsets[at];
    const int64_t stride = kPieces == Pieces::kPixels ? to_.channel_stride : 1;
    return pixel < 0 ? -1 : pixel + (from_.first_k + channel) * stride;
  }

  template <Pieces kPieces>
  __device__ auto load_residual(int round) const {
    constexpr int kCount = kCountOf<kPieces>;
    Pack<T, kCount> values = {};
    if (to_.epilogue.residual == nullptr) return values;
    const int64_t offset = offset_of_piece<kPieces>(round);
    if (offset < 0) return values;
    const T* residual = static_cast<const T*>(to_.epilogue.residual) + offset;
    if constexpr (kPieces == Pieces::kPacks) return load_pack<T, kCount>(residual);
    const int count = from_.filters - col<kPieces>(round);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) values.at[i] = residual[i * to_.channel_stride];
    }
    return values;
  }

  template <Pieces kPieces, int kCount>
  __device__ void store_piece(int64_t offset, int count, const Pack<T, kCount>& values) const {
    T* out = static_cast<T*>(to_.out) + offset;
    if constexpr (kPieces == Pieces::kPacks) {
      store_pack(out, values);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i < count) out[i * to_.channel_stride] = values.at[i];
      }
    }
  }

  // 16 bytes at a time. Eight sums are two such loads, and eight lanes side by side would meet the
  // same half of the banks: four take their second half first.
  template <int kCount>
  __device__ void load_sums(const float* at, float (&z)[kCount]) const {
    if constexpr (kCount == 8) {
      const bool swapped = kCols >= 64 && (thread_ & 4) != 0;
      const Pack<float, 4> one = load_pack<float, 4>(at + (swapped ? 4 : 0));
      const Pack<float, 4> two = load_pack<float, 4>(at + (swapped ? 0 : 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        z[i] = swapped ? two.at[i] : one.at[i];
        z[4 + i] = swapped ? one.at[i] : two.at[i];
      }
    } else {
      const Pack<float, kCount> all = load_pack<float, kCount>(at);
#pragma unroll
      for (int i = 0; i < kCount; ++i) z[i] = all.at[i];
    }
  }

  const StagedTile& from_;
  const StageTarget& to_;
  int thread_;
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
    store.template store_pieces<Pieces::kPacks>(statistics, moments);
  } else if (to.channel_stride == 1) {
    store.template store_pieces<Pieces::kChannels>(statistics, moments);
  } else {
    store.template store_pieces<Pieces::kPixels>(statistics, moments);
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
