// Depthwise convolution (C/G = 1, any multiplier K/G) and its input gradient as one thing. Along
// one axis, tap i of an output position j reads the virtual position
//   u = j * jump + start + i * dil
// of a source whose positions stand `up` apart with zeros between.
//   fprop: jump is the stride, up 1, start -pad; filter k reads channel k / multiplier.
//   dgrad: jump 1, up the stride, start pad - (R-1) * dil, the filter turned by half a turn;
//          channel c sums over its `multiplier` filters.
#pragma once

#include "cuda/conv2d.h"

namespace fastconv {
namespace cuda {

struct DepthwiseAxis {
  int source, target;
  int jump, up, start, taps, dil;
};

struct DepthwiseParams {
  const void *source, *filter;
  void* out;
  EpilogueParams epilogue;
  Strides4 src, dst;
  DepthwiseAxis h, w;
  int64_t N;
  int channels;    // written
  int terms;       // source channels summed over for each: 1, or the multiplier in dgrad
  int multiplier;  // K / G
  bool backward;

  // Source channel of term j, which in dgrad is also the filter; in fprop the filter is `channel`.
  __device__ int source_channel(int channel, int j) const {
    return backward ? channel * multiplier + j : channel / multiplier;
  }
  __device__ int filter_of(int channel, int j) const {
    return backward ? channel * multiplier + j : channel;
  }
};

// Source position under virtual position u; -1 outside and between.
__device__ inline int source_at(const DepthwiseAxis& a, int u) {
  return a.up == 1 ? (within(u, a.source) ? u : -1) : window_starting_at(u, a.up, a.source);
}

inline DepthwiseParams depthwise_params_of(const Conv2dProblem& p, const Conv2dArgs& args,
                                           bool backward) {
  const ConvParams conv = conv_params_of(p, args);
  DepthwiseParams t = {};
  t.source = backward ? args.grad : args.input;
  t.filter = args.filter;
  t.out = args.out;
  if (!backward) t.epilogue = conv.epilogue;
  t.src = backward ? conv.res : conv.in;
  t.dst = backward ? conv.in : conv.res;
  const auto axis = [&](int size, int out, int taps, int stride, int pad, int dil) {
    return backward ? DepthwiseAxis{out, size, 1, stride, pad - (taps - 1) * dil, taps, dil}
                    : DepthwiseAxis{size, out, stride, 1, -pad, taps, dil};
  };
  t.h = axis(conv.H, conv.P, conv.R, conv.stride_h, conv.pad_h, conv.dil_h);
  t.w = axis(conv.W, conv.Q, conv.S, conv.stride_w, conv.pad_w, conv.dil_w);
  t.N = p.N;
  t.multiplier = to_int(p.K / p.G);
  t.channels = to_int(backward ? p.C : p.K);
  t.terms = backward ? t.multiplier : 1;
  t.backward = backward;
  return t;
}

// Empty, or what does not fit. conv2d_depthwise_{nchw,nhwc}.cu.
std::string depthwise_nchw_supports(const Conv2dProblem& p, bool backward, const Device& device);
std::string depthwise_nhwc_supports(const Conv2dProblem& p, const Device& device);
void depthwise_nchw_launch(const char* name, const Conv2dProblem& p, const Conv2dArgs& args,
                           bool backward, void* stream);
void depthwise_nhwc_launch(const char* name, const Conv2dProblem& p, const Conv2dArgs& args,
                           bool backward, void* stream);

}  // namespace cuda
}  // namespace fastconv
