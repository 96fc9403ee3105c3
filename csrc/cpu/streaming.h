// What a memory-bound kernel costs.
#pragma once

#include <algorithm>

#include "core/kernel_table.h"
#include "cpu/isa.h"

namespace fastconv {

// Gigabytes a second that one thread of a row moves, measured on an EPYC 9004 at 103 MB of input
// (a plain copy: 19) with max pooling of 3 x 3 and stride 2: the vector rows keep up with memory
// and differ by their arithmetic on what the cache holds; portable has a quarter of AVX-512's lanes
// and converts 16-bit types with integer instructions, which halves it again.
constexpr double kAvx512Bandwidth = 16, kAvx2Bandwidth = 15, kPortableBandwidth = 8;
constexpr double kReferenceBandwidth = 0.4;  // scalar, an index computation for each element

constexpr double bandwidth_of(CpuIsa isa) {
  return isa == CpuIsa::kAvx512 ? kAvx512Bandwidth
         : isa == CpuIsa::kAvx2 ? kAvx2Bandwidth
                                : kPortableBandwidth;
}

// Microseconds to move `bytes`. More than 16 threads wait for the same memory.
inline double streaming_cost(double bytes, double gigabytes_per_second, const Device& device) {
  const int threads = std::min(std::max(device.threads, 1), 16);
  return 1.0 + bytes / (1e3 * gigabytes_per_second * threads);
}

// context.parallel_for, or this thread alone where waking others would take longer than the work:
// 64 KiB are moved in about 4 microseconds.
inline void for_ranges(const Context& context, int64_t units, double bytes,
                       const Context::RangeBody& body) {
  if (units == 0) return;
  if (context.threads <= 1 || bytes < 65536) {
    body(0, units);
  } else {
    context.parallel_for(units, body);
  }
}

}  // namespace fastconv
