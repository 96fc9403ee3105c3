// Grouped convolution on NHWC tensors, for groups too narrow for a matrix product: fprop and dgrad
// in conv2d_grouped.cpp, wgrad in conv2d_grouped_wgrad.cpp, their rows in conv2d_grouped_rows.cpp.
//
// A slab is one vector of output channels. Where a group has at least a vector of them, an input
// channel of the group is broadcast to all lanes. Where it has fewer, a slab spans several groups,
// and each lane takes its own group's channel: a permutation of one vector of input channels. So no
// lane is empty and nothing is multiplied by the zeros between groups.
#pragma once

#include "cpu/conv2d_window.h"

namespace fastconv {

// One axis of work for the register tile: `steps` runs of neighbouring taps of a filter row.
struct GroupedTile {
  int64_t steps;
  const int64_t* window;  // where each one's first tap lies under the tile's first pixel
  const int64_t* filter;  // and where that tap's filter vectors lie
  int64_t channels;       // of the reduction, in each tap: a multiple of 4
  int64_t tap_ld;         // filter elements from a tap to the next one of the window
  int64_t pitch;          // window elements from a pixel to the next
  int64_t step;           // source pixels between neighbouring output pixels
  int64_t group;          // lanes that read the same channels
  int64_t ldd;
  bool accumulate;
};

// Some rows of a filter gradient's reduction: sums[s][c][lane] += grad[q][lane] * window[q + s][c].
struct GroupedWgradTile {
  int64_t rows, columns;    // of output pixels
  int64_t window_ld;        // window elements between the source rows of neighbouring output rows
  int64_t grad_ld;          // elements between rows of grad, whose pixels touch
  int64_t channels, pitch;  // as above
  int64_t step, hop;        // source pixels between output pixels, and between taps
  int64_t group;
};

// Taps that share a loaded pixel. kThreeApart: three neighbours under output pixels two apart.
enum GroupedTaps { kOneTap, kTwoTaps, kThreeTaps, kThreeApart, kGroupedTapKinds };
constexpr int64_t taps_of(GroupedTaps kind) {
  return kind == kOneTap ? 1 : kind == kTwoTaps ? 2 : 3;
}

template <class T>
struct GroupedOps {
  using Acc = accumulator_t<T>;
  using Tile = void (*)(const GroupedTile&, const Acc* window, const Acc* filter, Acc* D);
  using Wgrad = void (*)(const GroupedWgradTile&, const Acc* window, const Acc* grad, Acc* sums);

  int64_t lanes;
  int64_t pixels[2];                  // of a long and of a short tile
  Tile tile[kGroupedTapKinds][2][2];  // [taps][permuted][short]
  Wgrad wgrad[kGroupedTapKinds][2];   // [taps][permuted]; of three taps apart and one tap alone
  typename ChannelWindow<T>::Copy copy;
};
template <class T>
const GroupedOps<T>& grouped_ops(CpuIsa isa);

// How the channels of one direction meet the lanes of a vector. A bundle is what reads the same
// input channels: a group, or the groups of one slab.
struct GroupedLanes {
  bool permuted;
  int64_t channels, columns;  // of a group: reduction and output
  int64_t window, slabs;      // of a bundle: input channels, slabs
  int64_t bundles;

  GroupedLanes(const Conv2dProblem& p, Direction direction, int64_t lanes)
      : channels((direction == Direction::kDgrad ? p.K : p.C) / p.G),
        columns((direction == Direction::kDgrad ? p.C : p.K) / p.G) {
    permuted = columns < lanes;
    window = permuted ? lanes : channels;
    slabs = permuted ? 1 : columns / lanes;
    bundles = permuted ? p.G * columns / lanes : p.G;
  }
};

size_t conv2d_grouped_workspace(const Conv2dProblem&, Direction, CpuIsa, int threads);
void conv2d_grouped(const Conv2dProblem&, Direction, CpuIsa, const Conv2dArgs&, const Context&);
size_t conv2d_grouped_wgrad_workspace(const Conv2dProblem&, CpuIsa, int threads);
void conv2d_grouped_wgrad(const Conv2dProblem&, CpuIsa, const Conv2dArgs&, const Context&);

}  // namespace fastconv
