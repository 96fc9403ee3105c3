// Depthwise convolution of NHWC tensors with large filters: conv2d_depthwise_window.cpp.
//
// A vector of channels of an image is copied once, with its padding, so that pixels are neighbours.
// A tile is two output rows of a few pixels: a source pixel loaded once meets both rows' filters,
// each filter vector all pixels of its row.
#pragma once

#include "cpu/conv2d_window.h"

namespace fastconv {

// Source rows one after the other, under one filter row each of one output row or of both: the two
// rows' ranges of them overlap.
struct DepthwiseTile {
  int64_t lead, both, tail;        // rows: of one output row, of both, of the other
  bool second_leads;               // the one is the second
  int64_t taps;                    // of a filter row, which touch
  int64_t window_row, window_tap;  // window elements between source rows, and between taps
  int64_t filter_row;              // filter elements between filter rows
  int64_t second;                  // from the first output row's filter row to the second's
  int64_t row_ld, pixel_ld;        // of D
  bool accumulate;                 // D += the sums
};

template <class T>
struct DepthwiseWindowOps {
  using Acc = accumulator_t<T>;
  using Tile = void (*)(const DepthwiseTile&, const Acc* window, const Acc* filter, Acc* D);

  int64_t lanes, pixels;
  Tile tile[2];  // of one output row (of which lead is all), of two
  typename ChannelWindow<T>::Copy copy;
};
template <class T>
const DepthwiseWindowOps<T>& depthwise_window_ops(CpuIsa isa);

}  // namespace fastconv
