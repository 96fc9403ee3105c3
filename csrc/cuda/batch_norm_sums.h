// BatchNorm's two sums a channel on a GPU, and what becomes of them: the channels' coefficients.
//
// Moments are (mean, M2) pairs, merged by Chan's formula: of the four packs a thread loads at once,
// of a thread's packs, of a block's threads, of the slices, always in the same order. They are
// those of d = x - pivot, with the channel's first element as the pivot, so that a mean far from
// zero costs float no digits: d is small where the spread is.
#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/batch_norm_element.h"
#include "cuda/launch.h"

namespace fastconv {
namespace cuda {

constexpr int kNormThreads = 256;
constexpr int kJoinedChannels = 32;  // of a block of the joining kernel: 8 threads to a channel

// Packs of a tensor that a thread has on their way at once: with a tail a third tensor and z's
// coefficients ask for registers, and with kAny every element for a switch's worth of code.
template <Tail kTail>
constexpr int kTileOf = kTail == Tail::kNone   ? 4
                        : kTail == Tail::kReLU ? 2
                                               : 1;

// What sums are kept in. Those of the gradients are of either sign and may come out small, so that
// float's roundings on the way would show; every fourth addition is one in double, which even cards
// with two double units an SM do faster than their memory delivers.
template <class A, bool kDgrad>
using SumType = std::conditional_t<kDgrad, double, A>;

// Count, mean and M2 of a set of numbers, or (dgrad) two sums.
template <class A, bool kDgrad>
struct Sums {
  using S = SumType<A, kDgrad>;
  S count = 0, first = 0, second = 0;

  // Chan, Golub and LeVeque: the moments of two sets together.
  __device__ void merge(S other_count, S other_first, S other_second) {
    if constexpr (kDgrad) {
      first += other_first;
      second += other_second;
    } else {
      const S share = other_count == 0 ? S(0) : other_count / (count + other_count);
      const S delta = other_first - first;
      first += delta * share;
      second += other_second + delta * delta * (count * share);
      count += other_count;
    }
  }
};

// A pairwise sum of f(kBegin) to f(kBegin + kCount - 1); kCount is a power of two.
template <int kCount, int kBegin = 0, class F>
__device__ inline auto sum_of(F&& f) {
  if constexpr (kCount == 1) {
    return f(kBegin);
  } else {
    return sum_of<kCount / 2, kBegin>(f) + sum_of<kCount / 2, kBegin + kCount / 2>(f);
  }
}

// Adds kCount numbers to `sums`: x(i) and, for dgrad, grad(i). `centre` is the pivot or the mean.
template <int kCount, class A, bool kDgrad, class X, class G>
__device__ inline void add_values(Sums<A, kDgrad>& sums, A centre, X&& x, G&& grad) {
  if constexpr (kDgrad) {
    constexpr int kRun = kCount < 4 ? kCount : 4;
#pragma unroll
    for (int from = 0; from < kCount; from += kRun) {
      A dz[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) dz[i] = grad(from + i);
      sums.first += sum_of<kRun>([&](int i) { return dz[i]; });
      sums.second += sum_of<kRun>([&](int i) { return dz[i] * (x(from + i) - centre); });
    }
  } else {
    const A mean = sum_of<kCount>([&](int i) { return x(i) - centre; }) * (A(1) / kCount);
    const A m2 = sum_of<kCount>([&](int i) {
      const A d = (x(i) - centre) - mean;
      return d * d;
    });
    sums.merge(A(kCount), mean, m2);
  }
}

template <class S, bool kDgrad>
struct SharedSums {
  S *first, *second, *count;  // count: of moments alone
  int64_t bytes;
  FASTCONV_HOST_DEVICE SharedSums(SharedCarver carve, int values)
      : first(carve.take<S>(values)),
        second(carve.take<S>(values)),
        count(kDgrad ? nullptr : carve.take<S>(values)),
        bytes(carve.bytes()) {}
};

// Joins the sums of threads that stand `lanes` apart (threadIdx.x = row * lanes + lane), those of
// row 0 first, pairwise; the result is row 0's. Every thread of the block calls it.
template <class A, bool kDgrad, int kValues>
__device__ inline void join_rows(Sums<A, kDgrad> (&sums)[kValues], int lanes) {
  using S = SumType<A, kDgrad>;
  const SharedSums<S, kDgrad> shared(SharedCarver(shared_memory()), kNormThreads * kValues);
  const int me = static_cast<int>(threadIdx.x);
  const auto put = [&] {
#pragma unroll
    for (int e = 0; e < kValues; ++e) {
      shared.first[e * kNormThreads + me] = sums[e].first;
      shared.second[e * kNormThreads + me] = sums[e].second;
      if (!kDgrad) shared.count[e * kNormThreads + me] = sums[e].count;
    }
  };
  __syncthreads();  // the block may have used this memory for another group just before
  put();
  for (int threads = kNormThreads / 2; threads >= lanes; threads /= 2) {
    __syncthreads();
    if (me < threads) {
#pragma unroll
      for (int e = 0; e < kValues; ++e) {
        const int other = e * kNormThreads + me + threads;
        const S count = kDgrad ? S(0) : shared.count[other];
        sums[e].merge(count, shared.first[other], shared.second[other]);
      }
      put();
    }
  }
}

template <class A, bool kDgrad>
__device__ inline void store_sums(const NormParams& t, int slice, int c, A centre,
                                  const Sums<A, kDgrad>& sums) {
  const int64_t at = int64_t{slice} * t.C + c;
  static_cast<SumType<A, kDgrad>*>(t.first)[at] = sums.first;
  static_cast<SumType<A, kDgrad>*>(t.second)[at] = sums.second;
  if (!kDgrad && slice == 0) static_cast<A*>(t.pivot)[c] = centre;
}

// What is subtracted from channel c's elements: `first_element` of the input (the pivot), or the
// mean.
template <class T, bool kDgrad>
__device__ inline accumulator_t<T> centre_of(const NormParams& t, int c, int64_t first_element) {
  if constexpr (kDgrad) return static_cast<const accumulator_t<T>*>(t.mean_in)[c];
  return widen(static_cast<const T*>(t.input)[first_element]);
}

// ---- The sums ------------------------------------------------------------------------------

// kTail is dgrad's: the moments are those of the input, whatever follows.
template <class T, int kVector, bool kDgrad, Tail kTail>
__global__ void __launch_bounds__(kNormThreads) batch_norm_sums_of_rows_kernel(const NormParams t) {
  using A = accumulator_t<T>;
  constexpr int kTile = kTileOf<kTail>;
  const int lanes = 1 << t.lanes_log2, rows = kNormThreads >> t.lanes_log2;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int row_lane = static_cast<int>(threadIdx.x) >> t.lanes_log2;
  for (int64_t block = blockIdx.x; block < t.blocks; block += gridDim.x) {
    const Division part = divide(block, t.groups);
    const int slice = static_cast<int>(part.quotient);
    const int c0 = (part.remainder * lanes + lane) * kVector;
    const bool mine = c0 < t.C;  // else the thread only meets the others at the barriers
    const int64_t begin = slice * t.per_slice;
    const int64_t end = mine ? min(begin + t.per_slice, t.extent) : begin;
    const T* input = static_cast<const T*>(t.input) + c0;
    const T* grad = static_cast<const T*>(t.grad) + c0;
    const T* beside = static_cast<const T*>(t.beside) + (t.beside == nullptr ? 0 : c0);

    Sums<A, kDgrad> sums[kVector];
    A centre[kVector];
    Derivative<A, kTail> derivative[kVector];
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      centre[e] = mine ? centre_of<T, kDgrad>(t, c0 + e, c0 + e) : A(0);
      if (mine) derivative[e].load(t, c0 + e);
    }
    const auto add_tile = [&](int64_t row, auto count) {
      constexpr int kCount = decltype(count)::value;
      Pack<T, kVector> x[kCount], dy[kCount] = {}, b[kCount] = {};
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int64_t offset = (row + i * rows) * t.C;
        x[i] = load_pack<T, kVector>(input + offset);
        if constexpr (kDgrad) dy[i] = load_pack<T, kVector>(grad + offset);
        if constexpr (kTail != Tail::kNone) {
          if (t.beside != nullptr) b[i] = load_pack<T, kVector>(beside + offset);
        }
      }
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const auto x_at = [&](int i) { return widen(x[i].at[e]); };
        add_values<kCount>(sums[e], centre[e], x_at, [&](int i) {
          const A dz =
              derivative[e].at(t, x_at(i) - centre[e], widen(dy[i].at[e]), widen(b[i].at[e]));
          b[i].at[e] = narrow<T>(dz);
          return dz;
        });
      }
      if (kTail != Tail::kNone && t.grad_residual != nullptr) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          store_pack(static_cast<T*>(t.grad_residual) + c0 + (row + i * rows) * t.C, b[i]);
        }
      }
    };
    int64_t row = begin + row_lane;
#pragma unroll 1
    for (; row + (kTile - 1) * rows < end; row += kTile * rows) {
      add_tile(row, std::integral_constant<int, kTile>{});
    }
#pragma unroll 1
    for (; row < end; row += rows) add_tile(row, std::integral_constant<int, 1>{});

    join_rows(sums, lanes);
    if (row_lane == 0 && mine) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) store_sums(t, slice, c0 + e, centre[e], sums[e]);
    }
  }
}

// A block sums slice blockIdx / C of channel blockIdx % C: packs of the channel's planes, in order.
template <class T, int kVector, bool kDgrad, Tail kTail>
__global__ void __launch_bounds__(kNormThreads)
    batch_norm_sums_of_planes_kernel(const NormParams t) {
  using A = accumulator_t<T>;
  constexpr int kTile = kTileOf<kTail>;
  for (int64_t block = blockIdx.x; block < t.blocks; block += gridDim.x) {
    const Division part = divide(block, t.C);
    const int slice = static_cast<int>(part.quotient), c = part.remainder;
    const int64_t end = min((slice + 1) * t.per_slice, t.extent) / kVector;
    int64_t pack = slice * t.per_slice / kVector + threadIdx.x;
    // Pack `pack` of the channel is pack `within` of plane `n`; both advance without a division.
    const int64_t planes_on = kNormThreads / t.plane_packs;
    const int64_t packs_on = kNormThreads - planes_on * t.plane_packs;
    int64_t n = pack / t.plane_packs, within = pack - n * t.plane_packs;

    Sums<A, kDgrad> sums[1];
    const A centre = centre_of<T, kDgrad>(t, c, c * t.plane_packs * kVector);
    Derivative<A, kTail> derivative;
    derivative.load(t, c);
    const auto add_tile = [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      Pack<T, kVector> x[kCount], dy[kCount] = {}, b[kCount] = {};
      int64_t offset[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        offset[i] = ((n * t.C + c) * t.plane_packs + within) * kVector;
        x[i] = load_pack<T, kVector>(static_cast<const T*>(t.input) + offset[i]);
        if constexpr (kDgrad) {
          dy[i] = load_pack<T, kVector>(static_cast<const T*>(t.grad) + offset[i]);
        }
        if constexpr (kTail != Tail::kNone) {
          if (t.beside != nullptr) {
            b[i] = load_pack<T, kVector>(static_cast<const T*>(t.beside) + offset[i]);
          }
        }
        n += planes_on;
        within += packs_on;
        if (within >= t.plane_packs) {
          within -= t.plane_packs;
          ++n;
        }
      }
      pack += kCount * kNormThreads;
      const auto x_at = [&](int i) { return widen(x[i / kVector].at[i % kVector]); };
      add_values<kCount * kVector>(sums[0], centre, x_at, [&](int i) {
        T& beside = b[i / kVector].at[i % kVector];
        const A dz = derivative.at(t, x_at(i) - centre, widen(dy[i / kVector].at[i % kVector]),
                                   widen(beside));
        beside = narrow<T>(dz);
        return dz;
      });
      if (kTail != Tail::kNone && t.grad_residual != nullptr) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          store_pack(static_cast<T*>(t.grad_residual) + offset[i], b[i]);
        }
      }
    };
#pragma unroll 1
    while (pack + (kTile - 1) * kNormThreads < end) add_tile(std::integral_constant<int, kTile>{});
#pragma unroll 1
    while (pack < end) add_tile(std::integral_constant<int, 1>{});

    join_rows(sums, 1);
    if (threadIdx.x == 0) store_sums(t, slice, c, centre, sums[0]);
  }
}

// ---- Joining the slices --------------------------------------------------------------------

// The sum over the slices of term(slice), 8 threads to a channel; valid in all 8.
template <class F>
__device__ inline double sum_slices(const NormParams& t, double* shared, F&& term) {
  const int lane = static_cast<int>(threadIdx.x) % kJoinedChannels;
  double sum = 0;
  for (int slice = static_cast<int>(threadIdx.x) / kJoinedChannels; slice < t.slices;
       slice += kNormThreads / kJoinedChannels) {
    sum += term(slice);
  }
  __syncthreads();  // the sum before this one has been read
  shared[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int i = 0; i < kNormThreads / kJoinedChannels; ++i)
    sum += shared[i * kJoinedChannels + lane];
  return sum;
}

// fprop: z = (x - mean) * scale + shift. The part of the mean that A cannot hold goes into the
// shift: with a mean of 1e4 it is worth 5e-4. Where an activation follows, dgrad computes z again
// from the mean and variance as they are stored, so that fprop does, too.
// dgrad: dx = ((dz - mean of dz) - (x - mean) * slope) * scale; in inference dz * scale.
template <class A, bool kDgrad>
__global__ void __launch_bounds__(kNormThreads) batch_norm_join_kernel(const NormParams t) {
  double* shared = SharedCarver(shared_memory()).take<double>(kNormThreads);
  for (int64_t block = blockIdx.x; block < t.blocks; block += gridDim.x) {
    const int64_t channel = block * kJoinedChannels + threadIdx.x % kJoinedChannels;
    const bool mine = channel < t.C;  // else the last channel again, not stored
    const int c = mine ? static_cast<int>(channel) : t.C - 1;
    using S = SumType<A, kDgrad>;
    const S* first = static_cast<const S*>(t.first) + c;
    const S* second = static_cast<const S*>(t.second) + c;
    const bool stores = mine && static_cast<int>(threadIdx.x) < kJoinedChannels;
    const double count = static_cast<double>(t.extent);
    A* coefficient = static_cast<A*>(t.coefficients) + c;
    if constexpr (!kDgrad) {
      // Chan's formula for all slices at once: M2 = sum of (M2_i + n_i * (mean_i - mean)^2).
      const auto size_of_slice = [&](int slice) {
        const int64_t begin = slice * t.per_slice;
        return static_cast<double>(min(begin + t.per_slice, t.extent) - begin);
      };
      const double above_pivot =
          sum_slices(t, shared,
                     [&](int slice) {
                       return size_of_slice(slice) *
                              static_cast<double>(first[int64_t{slice} * t.C]);
                     }) /
          count;
      const double m2 = sum_slices(t, shared, [&](int slice) {
        const double delta = static_cast<double>(first[int64_t{slice} * t.C]) - above_pivot;
        return static_cast<double>(second[int64_t{slice} * t.C]) +
               size_of_slice(slice) * delta * delta;
      });
      if (stores) {
        const double mean = static_cast<double>(static_cast<const A*>(t.pivot)[c]) + above_pivot;
        const double scale = static_cast<double>(channel_value<A>(t.weight, c, A(1))) /
                             std::sqrt(m2 / count + t.eps);
        const A rounded = static_cast<A>(mean), var = static_cast<A>(m2 / count);
        const A bias = channel_value<A>(t.bias, c, A(0));
        const bool again = t.activation != Activation::kNone;
        static_cast<A*>(t.mean_out)[c] = rounded;
        static_cast<A*>(t.var_out)[c] = var;
        coefficient[0] = rounded;
        coefficient[int64_t{t.C}] = again ? scale_of(t, c, var) : static_cast<A>(scale);
        coefficient[int64_t{t.C} * 2] =
            again ? bias
                  : static_cast<A>(static_cast<double>(bias) -
                                   (mean - static_cast<double>(rounded)) * scale);
      }
    } else {
      const double sum = sum_slices(
          t, shared, [&](int slice) { return static_cast<double>(first[int64_t{slice} * t.C]); });
      const double dot = sum_slices(
          t, shared, [&](int slice) { return static_cast<double>(second[int64_t{slice} * t.C]); });
      if (stores) {
        const double invstd =
            1 / std::sqrt(static_cast<double>(static_cast<const A*>(t.var_in)[c]) + t.eps);
        static_cast<A*>(t.grad_weight)[c] = static_cast<A>(dot * invstd);
        static_cast<A*>(t.grad_bias)[c] = static_cast<A>(sum);
        coefficient[0] = static_cast<const A*>(t.mean_in)[c];
        coefficient[int64_t{t.C}] = static_cast<A>(sum / count);
        coefficient[int64_t{t.C} * 2] = static_cast<A>(dot * invstd * invstd / count);
        coefficient[int64_t{t.C} * 3] =
            static_cast<A>(invstd * static_cast<double>(channel_value<A>(t.weight, c, A(1))));
      }
    }
  }
}

}  // namespace cuda
}  // namespace fastconv
