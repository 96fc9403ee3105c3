// Copies of tensors in the layout that the tensor-core kernels read: channels innermost, their
// count rounded up to whole 16-byte units, zeros behind the last. Made in the workspace, before the
// kernel. float32, float16 and bfloat16.
#pragma once

#include "core/conv2d_problem.h"
#include "core/integers.h"
#include "cuda/launch.h"
#include "cuda/ptx/mma.h"

namespace fastconv {
namespace cuda {

// How many channels such a copy of `channels` has: whole 16-byte units.
constexpr int64_t padded_channels(int64_t channels, DType dtype) {
  const int64_t unit = 16 / size_of(dtype);
  return ceil_div(channels, unit) * unit;
}

// One after the other in a workspace, each 1024-byte aligned relative to its beginning.
class WorkspaceCarver {
 public:
  explicit WorkspaceCarver(void* base = nullptr) : base_(static_cast<unsigned char*>(base)) {}
  void* take(int64_t bytes) {
    void* at = base_ == nullptr ? nullptr : base_ + offset_;
    offset_ += ceil_div(bytes, 1024) * 1024;
    return at;
  }
  size_t bytes() const { return static_cast<size_t>(offset_); }

 private:
  unsigned char* base_;
  int64_t offset_ = 0;
};

// N images of C channels of `pixels` each, in `layout`, as [N][pixels][G][padded_channels(C / G)]:
// of G groups each begins on a 16-byte unit. `to` is 16-byte aligned.
void copy_activations(const char* name, DType dtype, Layout layout, const void* from, void* to,
                      int64_t N, int64_t C, int64_t pixels, void* stream, int64_t G = 1);
int64_t activation_copy_bytes(DType dtype, int64_t N, int64_t C, int64_t pixels, int64_t G = 1);

// A filter K x C/G x R x S in `layout` (NCHW: KCRS; NHWC: KRSC), its reduced channels innermost:
//   kKRSC  [K][R][S][padded_channels(C/G)]               what fprop reads
//   kCRSK  [G * C/G][R][S][padded_channels(K/G)]         what dgrad reads
// split: float32 values as two such tensors, one behind the other: the hi and the lo of
// split_tf32().
enum class FilterOrder { kKRSC, kCRSK };
struct FilterCopy {
  FilterOrder order = FilterOrder::kKRSC;
  bool split = false;
};
void copy_filter(const char* name, const Conv2dProblem& p, const FilterCopy& copy, const void* from,
                 void* to, void* stream);
int64_t filter_copy_bytes(const Conv2dProblem& p, const FilterCopy& copy);  // both parts of a split

// A float32 number for 3xTF32 (DESIGN.md, "Numerics"): x rounded to TF32, and the rest rounded to
// TF32. hi + lo has 22 bits of x or more. Of an infinity lo is NaN, and so is what it is multiplied
// into: hi alone makes those results infinite or NaN anyway, and no other result meets it. The same
// becomes of the finite numbers from 2^128 - 2^116 on, which TF32 rounds to infinity.
struct Tf32Pair {
  uint32_t hi, lo;  // the bits of two floats
};
__device__ inline Tf32Pair split_tf32(float x) {
  const uint32_t hi = ptx::to_tf32(x);
  return {hi, ptx::to_tf32(x - __uint_as_float(hi))};
}

}  // namespace cuda
}  // namespace fastconv
