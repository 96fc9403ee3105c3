// Mean and variance of a convolution's results, from what its epilogue leaves of each tile.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastconv {
namespace cuda {

// Partials: float [tiles][K][2], mean and M2 (the sum of squared distances from it) of a filter's
// results over a tile's pixels. Tile i has the pixels i * pixels_per_tile .. of `pixels` in all.
int64_t statistics_bytes(int64_t tiles, int64_t K);

// Merges the tiles (at least one) of each filter by Chan's formula in an order that `tiles` alone
// decides; the variance is biased. mean_out, var_out: K floats.
void merge_statistics(const char* name, const float* partials, int64_t tiles,
                      int64_t pixels_per_tile, int64_t pixels, int64_t K, float* mean_out,
                      float* var_out, void* stream);

}  // namespace cuda
}  // namespace fastconv
