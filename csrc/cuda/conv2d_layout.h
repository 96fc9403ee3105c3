// Copies of tensors in the layout that the tensor-core kernels read: channels innermost, their count
// rounded up to whole 16-byte units, zeros behind the last. Made in the workspace, before the kernel.
#pragma once

#include "core/conv2d_problem.h"
#include "core/integers.h"

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

// N images of C channels of `pixels` each, in `layout`, as [N][pixels][padded_channels(C)].
void copy_activations(const char* name, DType dtype, Layout layout, const void* from, void* to,
                      int64_t N, int64_t C, int64_t pixels, void* stream);
int64_t activation_copy_bytes(DType dtype, int64_t N, int64_t C, int64_t pixels);

// A filter K x C/G x R x S in `layout` (NCHW: KCRS; NHWC: KRSC), its reduced channels innermost:
//   kKRSC  [K][R][S][padded_channels(C/G)]               what fprop reads
//   kCRSK  [G * C/G][R][S][padded_channels(K/G)]         what dgrad reads
// split: float32 values as two such tensors, one behind the other: x rounded to TF32, and the rest
// rounded to TF32, for 3xTF32 (DESIGN.md, "Numerics").
enum class FilterOrder { kKRSC, kCRSK };
struct FilterCopy {
  FilterOrder order = FilterOrder::kKRSC;
  bool split = false;
};
void copy_filter(const char* name, const Conv2dProblem& p, const FilterCopy& copy, const void* from,
                 void* to, void* stream);
int64_t filter_copy_bytes(const Conv2dProblem& p, const FilterCopy& copy);  // both parts of a split

}  // namespace cuda
}  // namespace fastconv
