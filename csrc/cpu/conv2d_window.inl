// Copying the pixels of a ChannelWindow. Included once for each instruction set: see isa.h.
#include "cpu/conv2d_simd.inl"

namespace fastconv::FASTCONV_ISA::conv2d {

// Whole vectors of the last channels where a pixel has room for them: zeros beyond.
template <class T>
void copy_pixels(const T* src, int64_t ld, int64_t pixels, int64_t channels, accumulator_t<T>* dst,
                 int64_t pitch) {
  using Acc = accumulator_t<T>;
  constexpr int L = kLanes<Acc>;
  if (channels == L) {
    for (int64_t i = 0; i < pixels; ++i) store(dst + i * pitch, load(src + i * ld));
    return;
  }
  for (int64_t i = 0; i < pixels; ++i, src += ld, dst += pitch) {
    int64_t c = 0;
    for (; c + L <= channels; c += L) store(dst + c, load(src + c));
    if (c == channels) continue;
    if (c + L <= pitch) {
      store(dst + c, load_part<Acc>(src + c, channels - c));
    } else {
      copy_short(dst + c, src + c, channels - c);
    }
  }
}

}  // namespace fastconv::FASTCONV_ISA::conv2d
