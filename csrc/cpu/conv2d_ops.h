// The building blocks of the implicit-GEMM convolutions, one compiled copy for each instruction set
// (isa.h), so that the drivers (conv2d_igemm.cpp, conv2d_wgrad.cpp) are compiled once.
//
// Every direction is   D[M x N] = A[M x depth] * B[depth x N]   on small row-major blocks that fit
// the caches. What differs is which operand is gathered from a tensor, and by whom:
//   im2row   NHWC: a matrix with a row a pixel and a column a (tap, channel)
//   im2col   NCHW: a matrix with a row a (tap, channel) and a column a pixel
//   permute  filters, and transposes of gradients
// All of them convert to the type of the accumulator while they copy; `store` converts back, once.
#pragma once

#include "core/conv2d_problem.h"
#include "core/kernel_table.h"

namespace fastconv {

// One spatial axis of a gather: grid point i under tap t reads source i * step + first + t * hop.
struct GatherAxis {
  int64_t size = 1;   // of the source
  int64_t count = 1;  // of the grid
  int64_t taps = 1;
  int64_t step = 1;
  int64_t first = 0;
  int64_t hop = 1;
};

// Which source elements a convolution multiplies. Pixels are numbered n, i, j, j fastest; the
// reduction index is (tap_h, tap_w, c), or (c, tap_h, tap_w) where channel_major.
struct Gather {
  int64_t N = 1, C = 1;                     // of the whole source tensor
  int64_t channels = 1, first_channel = 0;  // of the group
  GatherAxis h, w;
  bool channel_major = false;  // im2col only

  int64_t pixels() const { return N * h.count * w.count; }
  int64_t taps() const { return h.taps * w.taps; }
  int64_t depth() const { return taps() * channels; }
  // Pixel m of an NHWC tensor is then its m-th row of C elements: nothing needs gathering.
  bool is_identity() const {
    const auto plain = [](const GatherAxis& a) {
      return a.taps == 1 && a.step == 1 && a.first == 0 && a.count == a.size;
    };
    return plain(h) && plain(w);
  }
};

// The copy dst[sum x_i * dst_stride_i] = src[sum x_i * src_stride_i] over a box of four extents.
struct Permutation {
  int64_t extent[4];
  int64_t src_stride[4];
  int64_t dst_stride[4];
};

// How a tile of D = A * B addresses its operands. A's rows are contiguous in the reduction.
//   gemm:        the reduction is `segments` runs of `length`; run s of A starts at offsets[s] and
//                B's rows follow one another at a distance of ldb;
//   gemm_table:  one run; row k of B starts at offsets[k].
// Both read and write whole vectors: N counts as rounded up to `lanes` in B and D.
struct GemmShape {
  int64_t segments, length;
  const int64_t* offsets;
  int64_t lda, ldb, ldd;
  bool accumulate;  // D += A * B
};

// What `store` does to a row of accumulators; see Epilogue. One factor a column (NHWC), or the
// first one for all columns (NCHW).
template <class T>
struct RowEpilogue {
  const accumulator_t<T>* scale = nullptr;
  const accumulator_t<T>* shift = nullptr;
  const T* residual = nullptr;  // laid out as the row of the output
  bool per_column = false;
  Activation activation = Activation::kNone;
  accumulator_t<T> slope = 0;

  bool is_plain() const {
    return scale == nullptr && shift == nullptr && residual == nullptr &&
           activation == Activation::kNone;
  }
};

// acc[row * acc_ld + i] belongs to out[row * out_ld + i * step]. A step other than 1 is dgrad's, of
// one class of columns in NCHW.
struct RowBox {
  int64_t rows, columns, acc_ld, out_ld, step;
};

// One output row of a depthwise convolution in NHWC: pixel j reads source pixels
// j * step + first + t * hop of each of `rows` source rows.
template <class T>
struct DepthwiseRow {
  int64_t channels;
  int64_t rows;
  const T* const* source;                 // the rows that are not padding
  const accumulator_t<T>* const* filter;  // the filter row of each: [tap][filter_ld]
  int64_t filter_ld;
  GatherAxis w;
  T* out;            // of pixel 0, where the epilogue's residual is as well
  int64_t out_step;  // elements between neighbouring pixels of the row
};

// One phase of a plane (conv2d_planes.h): grid rows and columns that lie inside the source, and
// where they go. The rest of a plane is padding, which stays zero from one plane to the next.
struct PhaseCopy {
  int64_t rows, columns;                      // to copy
  int64_t source, source_row, source_column;  // offset of the first, distances
  int64_t plane;
};
struct DepthwisePlane {
  int64_t phases;
  const PhaseCopy* copies;
  int64_t row_ld;  // of the plane: also of the sums
  int64_t taps;
  const int64_t* offsets;       // of each tap
  int64_t rows, columns;        // of the output grid
  int64_t out_row, out_column;  // distances of its points in the output
};

template <class T>
struct Conv2dOps {
  using Acc = accumulator_t<T>;
  int64_t lanes;   // of one vector of Acc
  int64_t tile_m;  // the register tile: tile_m rows by tile_n columns
  int64_t tile_n;

  void (*gemm)(const GemmShape&, int64_t M, int64_t N, const Acc* A, const Acc* B, Acc* D);
  void (*gemm_table)(const GemmShape&, int64_t M, int64_t N, const Acc* A, const Acc* B, Acc* D);
  // Pixels [m0, m1), reduction indices [k0, k1).
  void (*im2row)(const Gather&, const T* src, int64_t m0, int64_t m1, int64_t k0, int64_t k1,
                 Acc* dst, int64_t ld);
  void (*im2col)(const Gather&, const T* src, int64_t m0, int64_t m1, int64_t k0, int64_t k1,
                 Acc* dst, int64_t ld);
  void (*permute)(const Permutation&, const T* src, Acc* dst);
  void (*permute_back)(const Permutation&, const Acc* src, T* dst);
  // out = epilogue(acc). Reads whole vectors of acc.
  void (*store)(const RowEpilogue<T>&, const RowBox&, const Acc* acc, T* out);
  // sum[i] += src[i] (i < n) in float64, over `rows` rows `ld` apart.
  void (*add_rows)(const T* src, int64_t rows, int64_t ld, int64_t n, double* sum);
  // The sum of n consecutive elements.
  double (*sum)(const T* src, int64_t n);
  void (*depthwise)(const DepthwiseRow<T>&, const RowEpilogue<T>&);
  // sum[tap][ld] += grad[q] * source[q * step + first + tap * hop] for a row of gradients.
  void (*depthwise_wgrad)(int64_t channels, const GatherAxis& w, const T* grad, const T* source,
                          Acc* sum, int64_t ld);
  // NCHW: copies a source plane, and convolves it. `sums` holds rows * row_ld and two vectors more.
  void (*copy_plane)(const DepthwisePlane&, const T* source, Acc* plane);
  void (*depthwise_plane)(const DepthwisePlane&, const Acc* plane, const Acc* filter, Acc* sums,
                          const RowEpilogue<T>&, T* out);
  // sum[tap] += sum of grad * plane at each tap; both in the plane's layout, grad's gaps are zero.
  void (*depthwise_plane_wgrad)(const DepthwisePlane&, const Acc* plane, const Acc* grad, Acc* sum);
};

template <class T>
const Conv2dOps<T>& conv2d_ops(CpuIsa isa);

}  // namespace fastconv
