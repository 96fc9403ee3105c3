// The columns of an NCHW pooling window, a vector of outputs at a time.
//
// Tap s of output q reads padded column x = q * stride + s * dilation. A padded row is kept split
// into its phases x % stride, each contiguous: then tap s of outputs q, q + 1, ... lies in one
// phase, at (s * dilation) / stride + q, and is one plain vector load for any stride. The padding
// is part of the staged row, so that no tap asks whether it is inside.

namespace fastconv {
namespace FASTCONV_ISA {

struct Columns {
  int64_t W, Q, S, stride, dilation, pad;
  int64_t padded_Q;             // Q rounded up to whole vectors
  int64_t max_shift;            // (s * dilation) / stride of the last tap
  int64_t pitch;                // elements between two phases of a staged row
  std::vector<int64_t> phases;  // those that some tap reads, ascending
  std::vector<int64_t> slot;    // of phase f in `phases`, or -1
  std::vector<int64_t> offset;  // of tap s in a staged row, at q = 0

  Columns(const Pool2dProblem& t, int64_t lanes)
      : W(t.W), Q(t.Q), S(t.S), stride(t.stride_w), dilation(t.dil_w), pad(t.pad_w) {
    // With one output the stride is never taken; any that keeps the taps' phases apart will do.
    if (Q <= 1) stride = std::min(stride, (S - 1) * dilation + 1);
    padded_Q = ceil_div(Q, lanes) * lanes;
    max_shift = (S - 1) * dilation / stride;
    // Long enough for every tap and for every staged element, in whole vectors.
    pitch = std::max(padded_Q + max_shift, (pad + W) / stride) + 2 * lanes;
    slot.assign(static_cast<size_t>(stride), -1);
    for (int64_t s = 0; s < S; ++s) slot[static_cast<size_t>(s * dilation % stride)] = 0;
    for (int64_t f = 0; f < stride; ++f) {
      if (slot[static_cast<size_t>(f)] < 0) continue;
      slot[static_cast<size_t>(f)] = static_cast<int64_t>(phases.size());
      phases.push_back(f);
    }
    for (int64_t s = 0; s < S; ++s) {
      const int64_t x = s * dilation;
      offset.push_back(slot[static_cast<size_t>(x % stride)] * pitch + x / stride);
    }
  }
  size_t staged_size() const { return phases.size() * static_cast<size_t>(pitch); }
  bool both_phases() const { return stride == 2 && phases.size() == 2; }
};

// Fills `staged` (staged_size() elements, `fill` everywhere at first) with a row. load_block(w)
// gives elements w, w + 1, ...; `fill` at W and beyond. `linear` holds W and a vector more.
template <class A, class LoadBlock>
FASTCONV_INLINE void stage_row(const Columns& k, A* staged, A* linear, LoadBlock&& load_block) {
  constexpr int64_t L = Lanes<A>::kCount;
  if (k.stride == 1) {
    for (int64_t w = 0; w < k.W; w += L) store(staged + k.pad + w, load_block(w));
  } else if (k.both_phases()) {
    // Column w stands at x = w + pad: the even ones all in phase pad % 2, the odd ones in the
    // other.
    A* even_columns = staged + (k.pad % 2) * k.pitch + k.pad / 2;
    A* odd_columns = staged + ((k.pad + 1) % 2) * k.pitch + (k.pad + 1) / 2;
    for (int64_t w = 0; w < k.W; w += 2 * L) {
      Vec<A> even, odd;
      deinterleave<A>(load_block(w), load_block(w + L), even, odd);
      store(even_columns + w / 2, even);
      store(odd_columns + w / 2, odd);
    }
  } else {
    for (int64_t w = 0; w < k.W; w += L) store(linear + w, load_block(w));
    for (size_t i = 0; i < k.phases.size(); ++i) {
      const int64_t start = k.phases[i] - k.pad;  // the column at j = 0
      A* phase = staged + static_cast<int64_t>(i) * k.pitch;
      int64_t j = first_tap(start, k.stride);
      const int64_t end = std::min(k.padded_Q + k.max_shift, ceil_div(k.W - start, k.stride));
      for (; j < end; ++j) phase[j] = linear[start + j * k.stride];
    }
  }
}

}  // namespace FASTCONV_ISA
}  // namespace fastconv
