// A window of an image: what the grouped and the depthwise kernels read instead of the tensor.
#pragma once

#include "cpu/conv2d_igemm.h"

namespace fastconv {

// The source rows under some output rows, of a few channels: copied with their padding, so that
// every tap is an offset and pixels are neighbours instead of meeting in one set of a cache.
template <class T>
class ChannelWindow {
 public:
  using Acc = accumulator_t<T>;
  // Copies `channels` channels of `pixels` pixels that lie ld apart, to pixels `pitch` apart.
  using Copy = void (*)(const T* src, int64_t ld, int64_t pixels, int64_t channels, Acc* dst,
                        int64_t pitch);

  // A pixel takes `pitch` elements.
  ChannelWindow(const Gather& gather, int64_t pitch)
      : g_(with_taps(gather)),
        h_(g_.h),
        w_(g_.w),
        pitch_(pitch),
        width_((gather.w.count - 1) * gather.w.step + w_.span + 1),
        row_ld_(width_ * pitch) {}

  int64_t row_ld() const { return row_ld_; }
  // Output rows whose window takes at most `bytes`.
  int64_t rows_within(int64_t bytes) const {
    const int64_t fit = bytes / (row_ld_ * static_cast<int64_t>(sizeof(Acc)));
    return std::clamp<int64_t>((fit - h_.span - 1) / g_.h.step + 1, 1,
                               std::max<int64_t>(g_.h.count, 1));
  }
  int64_t span_h() const { return h_.span; }
  int64_t size(int64_t rows) const { return ((rows - 1) * g_.h.step + h_.span + 1) * row_ld_; }
  // Of tap (r, s) of the first output pixel.
  int64_t offset(int64_t r, int64_t s) const {
    return WindowAxis::tap_offset(g_.h, r) * row_ld_ + WindowAxis::tap_offset(g_.w, s) * pitch_;
  }

  // Under output rows [rows.begin, rows.end) of an image, channels [first, first + channels).
  void copy(Copy copy_pixels, const T* source, int64_t image, Share rows, int64_t first,
            int64_t channels, Acc* window) const {
    const int64_t last = (rows.end - rows.begin - 1) * g_.h.step + h_.span;
    const int64_t left = std::clamp<int64_t>(-w_.low, 0, width_);
    const int64_t right = std::clamp<int64_t>(g_.w.size - w_.low, left, width_);
    for (int64_t i = 0; i <= last; ++i, window += row_ld_) {
      const int64_t y = rows.begin * g_.h.step + h_.low + i;
      if (y < 0 || y >= g_.h.size) {
        std::fill_n(window, row_ld_, Acc(0));
        continue;
      }
      std::fill_n(window, left * pitch_, Acc(0));
      const int64_t pixel = (image * g_.h.size + y) * g_.w.size + left + w_.low;
      copy_pixels(source + pixel * g_.C + first, g_.C, right - left, channels,
                  window + left * pitch_, pitch_);
      std::fill_n(window + right * pitch_, (width_ - right) * pitch_, Acc(0));
    }
  }

  // The same of an NCHW tensor, by `permute` of Conv2dOps.
  void copy_planes(void (*permute)(const Permutation&, const T*, Acc*), const T* source,
                   int64_t image, Share rows, int64_t first, int64_t channels, Acc* window) const {
    const int64_t top = rows.begin * g_.h.step + h_.low, H = g_.h.size, W = g_.w.size;
    const int64_t height = (rows.end - rows.begin - 1) * g_.h.step + h_.span + 1;
    const int64_t upper = std::clamp<int64_t>(-top, 0, height);
    const int64_t lower = std::clamp<int64_t>(H - top, upper, height);
    const int64_t left = std::clamp<int64_t>(-w_.low, 0, width_);
    const int64_t right = std::clamp<int64_t>(W - w_.low, left, width_);
    std::fill_n(window, height * row_ld_, Acc(0));
    if (upper == lower || left == right) return;
    permute({{channels, lower - upper, right - left, 1}, {H * W, W, 1, 0}, {1, row_ld_, pitch_, 0}},
            source + ((image * g_.C + first) * H + top + upper) * W + left + w_.low,
            window + upper * row_ld_ + left * pitch_);
  }

 private:
  // A class of dgrad's rows that no tap meets still has a window, of one tap.
  static Gather with_taps(Gather g) {
    g.h.taps = std::max<int64_t>(g.h.taps, 1);
    g.w.taps = std::max<int64_t>(g.w.taps, 1);
    return g;
  }

  const Gather g_;
  const WindowAxis h_, w_;
  const int64_t pitch_, width_, row_ld_;
};

}  // namespace fastconv
