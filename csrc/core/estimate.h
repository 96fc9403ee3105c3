// What the rows of a GPU check and estimate on the host, whoever wrote their kernels. Both kinds of
// row are compared by these numbers, so that one clock and one bandwidth must serve both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/kernel_table.h"

namespace fastconv {

// Offsets into tensors may be 64-bit, positions along one axis are int: a quantity of one axis must
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

// Expected microseconds of a kernel that moves `bytes` and does `flops`, of which an SM does
// `flops_a_cycle`. 1.5 GHz and 25 GB/s an SM describe an A100 (108 SMs, 2.0 TB/s) and an H200 (132
// SMs, 4.8 TB/s) within a factor of two: enough to order rows.
inline double gpu_us(double launch_us, double bytes, double flops, double flops_a_cycle,
                     const Device& device) {
  const double sms = std::max(device.sm_count, 1);
  const double memory_us = bytes / (sms * 25e3);
  const double arithmetic_us = flops / (sms * flops_a_cycle * 1.5e3);
  return launch_us + std::max(memory_us, arithmetic_us);
}

// The device as a launch of `blocks` sees it where a kernel reaches its share of the peak with
// `a_sm` blocks on every SM: with fewer, the rest idles.
inline Device busy_part(Device device, int64_t blocks, int64_t a_sm) {
  const int64_t busy = std::min<int64_t>(device.sm_count, blocks / a_sm);
  device.sm_count = static_cast<int>(std::max<int64_t>(1, busy));
  return device;
}

// By how much a launch's arithmetic grows because its last wave takes as long as a full one.
inline double whole_waves(const Device& device, int64_t blocks, int64_t a_sm) {
  const int64_t slots = std::max(device.sm_count, 1) * a_sm;
  if (blocks <= slots) return 1;  // busy_part() knows
  return static_cast<double>((blocks + slots - 1) / slots * slots) / static_cast<double>(blocks);
}

}  // namespace fastconv
