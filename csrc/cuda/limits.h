// What every CUDA row checks and estimates on the host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/kernel_table.h"

namespace fastconv {
namespace cuda {

// Offsets into tensors are 64-bit, positions along one axis are int: a quantity of one axis must
// fit. `name` and the value go into the refusal.
struct AxisQuantity {
  const char* name;
  int64_t value;
};
inline std::string refuse_beyond_int(std::initializer_list<AxisQuantity> quantities) {
  for (const AxisQuantity& q : quantities) {
    if (q.value > 0x7fffffff) return std::string(q.name) + " " + std::to_string(q.value);
  }
  return {};
}

// Expected microseconds of a kernel that moves `bytes` and does `flops`, reaching `share` of an
// SM's 128 float32 multiply-adds a cycle. 1.5 GHz and 25 GB/s an SM describe an A100 (108 SMs,
// 2.0 TB/s) and an H200 (132 SMs, 4.8 TB/s) within a factor of two: enough to order rows.
inline double expected_us(double bytes, double flops, double share, const Device& device) {
  const double sms = std::max(device.sm_count, 1);
  const double memory_us = bytes / (sms * 25e3);
  const double arithmetic_us = flops / (sms * 128 * 2 * 1.5e3 * share);
  return 3.0 + std::max(memory_us, arithmetic_us);  // 3 us: the launch
}

}  // namespace cuda
}  // namespace fastconv
