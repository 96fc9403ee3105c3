// Which instruction set this CPU has, and how one kernel source becomes one compiled copy for each.
//
// A file `foo.inl` holds kernels inside `namespace FASTCONV_ISA`, written with GCC vector types of
// FASTCONV_VECTOR_BYTES bytes; `foo.cpp` includes what foo.inl needs, then says
//     #define FASTCONV_KERNEL_FILE "cpu/foo.inl"
//     #include "cpu/for_each_isa.h"
// and gets fastconv::avx512::..., fastconv::avx2::... and fastconv::portable::.... No per-file
// compiler flags are needed, and the portable copy holds no instruction that needs a check.
// Standard headers must come before: code of theirs must not be compiled for a newer machine.
#pragma once

#include "core/kernel_table.h"

namespace fastconv {

inline CpuIsa host_isa() {
#if defined(__x86_64__)
  static const CpuIsa isa = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 && avx512 ? CpuIsa::kAvx512 : avx2 ? CpuIsa::kAvx2 : CpuIsa::kPortable;
  }();
  return isa;
#else
  return CpuIsa::kPortable;
#endif
}

constexpr const char* name_of(CpuIsa isa) {
  return isa == CpuIsa::kAvx512 ? "avx512" : isa == CpuIsa::kAvx2 ? "avx2" : "portable";
}

}  // namespace fastconv
