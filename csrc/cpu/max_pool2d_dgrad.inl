// Max pooling backward, one copy for each instruction set. Included by max_pool2d.inl.
//
// Two ways, with the same bits: each input element is the sum of its windows' gradients in the
// order of the windows, kept in the accumulator's type and rounded once. No two threads write one
// element, so neither needs atomics nor depends on the number of threads.
//   scatter: a thread owns planes; each output adds its gradient where its maximum stood.
//   gather (NHWC, few windows over an element): each element looks through its windows, a vector
//   of channels at a time.

namespace fastconv {
namespace FASTCONV_ISA {

// ---- Scatter -------------------------------------------------------------------------------

// `channels` neighbouring channels of one image (1 in NCHW) as rows of contiguous elements: a row
// is an output row in NCHW, an output pixel's channels in NHWC.
struct Scatter {
  int64_t rows_per_p;          // 1, or Q
  int64_t row_length;          // Q, or channels
  int64_t along;               // what one step along the row moves in the input: stride_w, or 1
  int64_t flat_along;          // the same beyond what a flat position says: 0, or 1
  int64_t across;              // what one input column moves: 1, or the distance between pixels
  int64_t input_size;          // bound of a position: H * W * across
  std::vector<int64_t> delta;  // of offset r * S + s, from the window's first tap

  Scatter(const Pool2dProblem& t, int64_t channels, int64_t pixel_distance) {
    const bool nchw = t.layout == Layout::kNCHW || t.C == 1;
    rows_per_p = nchw ? 1 : t.Q;
    row_length = nchw ? t.Q : channels;
    along = nchw ? t.stride_w : 1;
    flat_along = nchw ? 0 : 1;
    across = nchw ? 1 : pixel_distance;
    input_size = t.H * t.W * across;
    if (t.index == PoolIndex::kFlatIndex64) return;
    for (int64_t r = 0; r < t.R; ++r) {
      for (int64_t s = 0; s < t.S; ++s) {
        delta.push_back((r * t.dil_h * t.W + s * t.dil_w) * across);
      }
    }
  }
};

// Adds one image's gradients to `sum` (zeros at first). `row_distance`: elements between two rows
// of grad and index.
template <class T, class Index>
void scatter_image(const Pool2dProblem& t, const Scatter& k, const T* grad, const Index* index,
                   int64_t row_distance, accumulator_t<T>* sum) {
  using A = accumulator_t<T>;
  constexpr bool kFlat = sizeof(Index) == 8;
  const int64_t* delta = k.delta.data();
  const auto deltas = static_cast<uint64_t>(k.delta.size());
  for (int64_t row = 0; row < t.P * k.rows_per_p; ++row) {
    const int64_t p = row / k.rows_per_p, q = row % k.rows_per_p;
    const int64_t first = ((p * t.stride_h - t.pad_h) * t.W + q * t.stride_w - t.pad_w) * k.across;
    const T* g = grad + row * row_distance;
    const Index* at = index + row * row_distance;
    for (int64_t i = 0; i < k.row_length; ++i) {
      int64_t position;
      if constexpr (kFlat) {
        position = at[i] * k.across + i * k.flat_along;
      } else {
        // Kept positions are always inside; one that the caller made up must not write outside.
        if (static_cast<uint64_t>(at[i]) >= deltas) continue;
        position = first + i * k.along + delta[at[i]];
      }
      if (static_cast<uint64_t>(position) < static_cast<uint64_t>(k.input_size)) {
        sum[position] += A(g[i]);
      }
    }
  }
}

// Planes [begin, end) of the N * C.
template <class T, class Index>
void max_scatter_nchw(const Pool2dProblem& t, const Pool2dArgs& a, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  constexpr int64_t L = Lanes<A>::kCount;
  const Scatter k(t, 1, 1);
  const int64_t HW = t.H * t.W, PQ = t.P * t.Q;
  std::vector<A> plane_sum(sizeof(T) == 2 ? static_cast<size_t>(HW + L) : 0);
  for (int64_t plane = begin; plane < end; ++plane) {
    T* out = static_cast<T*>(a.out) + plane * HW;
    A* sum;
    if constexpr (sizeof(T) == 2) {
      sum = plane_sum.data();
    } else {
      sum = out;
    }
    std::fill(sum, sum + HW, A(0));
    scatter_image(t, k, static_cast<const T*>(a.grad) + plane * PQ,
                  static_cast<const Index*>(a.index_in) + plane * PQ, t.Q, sum);
    if constexpr (sizeof(T) == 2) {
      for (int64_t i = 0; i < HW; i += L) store_upto(out + i, load(sum + i), HW - i);
    }
  }
}

// Channels of an image that a thread scatters at once: whole cache lines of every type, fewer where
// the image is large, so that their sums (a float an element) take 4 MiB at most.
inline int64_t scatter_channels(const Pool2dProblem& t) {
  const int64_t room = (int64_t{1} << 20) / (t.H * t.W) / 16 * 16;
  return std::min(t.C, std::clamp<int64_t>(room, 16, 64));
}

// Groups [begin, end) of the N * ceil(C / scatter_channels).
template <class T, class Index>
void max_scatter_nhwc(const Pool2dProblem& t, const Pool2dArgs& a, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  constexpr int64_t L = Lanes<A>::kCount;
  const int64_t width = scatter_channels(t), groups = ceil_div(t.C, width), HW = t.H * t.W;
  std::vector<A> sum(static_cast<size_t>(HW * width + L));
  for (int64_t group = begin; group < end; ++group) {
    const int64_t n = group / groups, c = group % groups * width;
    const int64_t channels = std::min(width, t.C - c);
    const Scatter k(t, channels, width);
    std::fill(sum.begin(), sum.end(), A(0));
    const int64_t from = n * t.P * t.Q * t.C + c;
    scatter_image(t, k, static_cast<const T*>(a.grad) + from,
                  static_cast<const Index*>(a.index_in) + from, t.C, sum.data());
    T* out = static_cast<T*>(a.out) + n * HW * t.C + c;
    for (int64_t pixel = 0; pixel < HW; ++pixel) {
      for (int64_t i = 0; i < channels; i += L) {
        store_upto(out + pixel * t.C + i, load(sum.data() + pixel * width + i), channels - i);
      }
    }
  }
}

// ---- Gather --------------------------------------------------------------------------------

// Positions i, i + 1, ... (the first n, if n is less than a vector; the others 0).
template <class A, class Index>
FASTCONV_INLINE IntVec<A> load_index(const Index* index, int64_t n) {
  constexpr int64_t L = Lanes<A>::kCount;
  typename Lanes<A>::Int lanes[L];
  if (n >= L) {
    for (int64_t l = 0; l < L; ++l) lanes[l] = static_cast<typename Lanes<A>::Int>(index[l]);
  } else {
    for (int64_t l = 0; l < L; ++l) {
      lanes[l] = l < n ? static_cast<typename Lanes<A>::Int>(index[l]) : 0;
    }
  }
  return load_int<A>(lanes);
}

// Along one axis: the (output, tap) pairs that read an input element, outputs ascending.
struct Readers {
  struct Pair {
    int64_t output, tap;
  };
  std::vector<Pair> pairs;
  std::vector<size_t> start;  // of input element i: pairs[start[i]] to pairs[start[i + 1] - 1]

  Readers(int64_t size, int64_t outputs, int64_t taps, int64_t stride, int64_t dilation,
          int64_t pad) {
    start.push_back(0);
    for (int64_t i = 0; i < size; ++i) {
      // Taps descending: outputs ascending.
      for (int64_t tap = taps - 1; tap >= 0; --tap) {
        const int64_t x = i + pad - tap * dilation;
        if (x >= 0 && x % stride == 0 && x / stride < outputs) pairs.push_back({x / stride, tap});
      }
      start.push_back(pairs.size());
    }
  }
  const Pair* begin(int64_t i) const { return pairs.data() + start[static_cast<size_t>(i)]; }
  const Pair* end(int64_t i) const { return pairs.data() + start[static_cast<size_t>(i) + 1]; }
};

// Input rows [begin, end) of the N * H.
template <class T, class Index>
void max_gather_nhwc(const Pool2dProblem& t, const Pool2dArgs& a, int64_t begin, int64_t end) {
  using A = accumulator_t<T>;
  constexpr int64_t L = Lanes<A>::kCount;
  constexpr bool kFlat = sizeof(Index) == 8;
  const Readers rows(t.H, t.P, t.R, t.stride_h, t.dil_h, t.pad_h);
  const Readers columns(t.W, t.Q, t.S, t.stride_w, t.dil_w, t.pad_w);
  for (int64_t pixel = begin * t.W; pixel < end * t.W; ++pixel) {
    const int64_t n = pixel / t.W / t.H, h = pixel / t.W % t.H, w = pixel % t.W;
    const int64_t image = n * t.P * t.Q * t.C;
    const T* grad = static_cast<const T*>(a.grad) + image;
    const Index* index = static_cast<const Index*>(a.index_in) + image;
    T* out = static_cast<T*>(a.out) + pixel * t.C;
    const auto gather = [&](int64_t c, auto vectors) FASTCONV_INLINE_LAMBDA {
      constexpr int64_t kVectors = decltype(vectors)::value;  // 0: less than one
      Vec<A> sum[kVectors + 1] = {};
      for (auto row = rows.begin(h); row != rows.end(h); ++row) {
        for (auto col = columns.begin(w); col != columns.end(w); ++col) {
          const IntVec<A> key = broadcast_int<A>(kFlat ? h * t.W + w : row->tap * t.S + col->tap);
          const int64_t i = (row->output * t.Q + col->output) * t.C + c;
          for (int64_t v = 0; v < kVectors; ++v) {
            const IntVec<A> at = load_index<A>(index + i + v * L, L);
            sum[v] += at == key ? load(grad + i + v * L) : Vec<A>{};
          }
          if constexpr (kVectors == 0) {
            const IntVec<A> at = load_index<A>(index + i, t.C - c);
            sum[0] += at == key ? load_first(grad + i, t.C - c, Vec<A>{}) : Vec<A>{};
          }
        }
      }
      for (int64_t v = 0; v < kVectors; ++v) store(out + c + v * L, sum[v]);
      if constexpr (kVectors == 0) store_first(out + c, sum[0], t.C - c);
    };
    int64_t c = 0;
    for (; c + 4 * L <= t.C; c += 4 * L) gather(c, std::integral_constant<int64_t, 4>());
    for (; c + L <= t.C; c += L) gather(c, std::integral_constant<int64_t, 1>());
    if (c < t.C) gather(c, std::integral_constant<int64_t, 0>());
  }
}

template <class T, class Index>
void max_dgrad(const Pool2dProblem& t, const Pool2dArgs& a, const Context& context) {
  // A gather looks at R * S / (stride_h * stride_w) windows an element: 9 of them cost as much as
  // one scatter. Its vectors are of channels.
  const bool gathers =
      t.layout == Layout::kNHWC && t.C >= 8 && t.R * t.S <= 9 * t.stride_h * t.stride_w;
  if (t.layout == Layout::kNCHW || t.C == 1) {
    for_ranges(context, t.N * t.C, t.bytes(),
               [&](int64_t begin, int64_t end) { max_scatter_nchw<T, Index>(t, a, begin, end); });
  } else if (gathers) {
    for_ranges(context, t.N * t.H, t.bytes(),
               [&](int64_t begin, int64_t end) { max_gather_nhwc<T, Index>(t, a, begin, end); });
  } else {
    for_ranges(context, t.N * ceil_div(t.C, scatter_channels(t)), t.bytes(),
               [&](int64_t begin, int64_t end) { max_scatter_nhwc<T, Index>(t, a, begin, end); });
  }
}

void max_pool2d_dgrad(const Pool2dProblem& t, const Pool2dArgs& a, const Context& context) {
  if (t.input_elements() == 0) return;
  dispatch_dtype(t.dtype, [&](auto type) {
    using T = decltype(type);
    if (t.index == PoolIndex::kOffset8) {
      max_dgrad<T, uint8_t>(t, a, context);
    } else if (t.index == PoolIndex::kOffset32) {
      max_dgrad<T, int32_t>(t, a, context);
    } else {
      max_dgrad<T, int64_t>(t, a, context);
    }
  });
}

}  // namespace FASTCONV_ISA
}  // namespace fastconv
