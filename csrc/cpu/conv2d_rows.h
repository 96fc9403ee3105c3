// What the files that list rows of CPU convolutions share, and what stands behind the rows that
// conv2d_rows.cpp lists.
#pragma once

#include <string>

#include "core/kernel_table.h"
#include "cpu/isa.h"

namespace fastconv {

constexpr double kStartMicroseconds = 5;       // waking the threads, once or twice a call
constexpr double kBytesPerMicrosecond = 10e3;  // what a thread moves while it gathers or stores

// Multiply-adds of the implicit GEMM's register tile a microsecond and thread in float32, measured
// (3.7 GHz, two 256-bit or one 512-bit unit: 59 at the peak) less what gathering takes. Half of it
// in float64.
constexpr double gemm_rate_of(CpuIsa isa) {
  return isa == CpuIsa::kAvx512 ? 50e3 : isa == CpuIsa::kAvx2 ? 45e3 : 15e3;
}

// Of a vector of accumulators.
constexpr int64_t lanes_of(CpuIsa isa, DType dtype) {
  const int64_t lanes = isa == CpuIsa::kAvx512 ? 16 : isa == CpuIsa::kAvx2 ? 8 : 4;
  return dtype == DType::kFloat64 ? lanes / 2 : lanes;
}

// The instruction sets that this build has kernels for, the widest first.
template <class Body>
void for_each_built_isa(const Body& body) {
#if defined(__x86_64__)
  body(CpuIsa::kAvx512);
  body(CpuIsa::kAvx2);
#endif
  body(CpuIsa::kPortable);
}

// A row of all dtypes and layouts; what it takes and does is left to the caller.
inline Conv2dKernel cpu_conv2d_row(const std::string& kind, CpuIsa isa, Direction direction) {
  Conv2dKernel row;
  row.name = kind + "_" + name_of(isa) + "_" + name_of(direction);
  row.op = "conv2d";
  row.direction = direction;
  row.backend = Backend::kCpu;
  row.arch = name_of(isa);
  row.dtypes = kAllDTypes;
  row.layouts = kAllLayouts;
  return row;
}

// The workspace is counted for as many threads as the launch will have. fprop and dgrad are in
// conv2d_igemm.h.
size_t conv2d_wgrad_workspace(const Conv2dProblem&, CpuIsa, const Device&);
void conv2d_wgrad(const Conv2dProblem&, CpuIsa, const Conv2dArgs&, const Context&);

size_t conv2d_bgrad_workspace(const Conv2dProblem&);
void conv2d_bgrad(const Conv2dProblem&, CpuIsa, const Conv2dArgs&, const Context&);

}  // namespace fastconv
