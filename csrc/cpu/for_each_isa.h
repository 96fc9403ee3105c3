// Included once a .cpp, without a guard: see isa.h.
#ifndef FASTCONV_KERNEL_FILE
#error "define FASTCONV_KERNEL_FILE before including cpu/for_each_isa.h"
#endif

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define FASTCONV_ISA avx512
#define FASTCONV_VECTOR_BYTES 64
#include FASTCONV_KERNEL_FILE
#undef FASTCONV_ISA
#undef FASTCONV_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTCONV_ISA avx2
#define FASTCONV_VECTOR_BYTES 32
#include FASTCONV_KERNEL_FILE
#undef FASTCONV_ISA
#undef FASTCONV_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // x86-64

#define FASTCONV_ISA portable
#define FASTCONV_VECTOR_BYTES 16
#include FASTCONV_KERNEL_FILE
#undef FASTCONV_ISA
#undef FASTCONV_VECTOR_BYTES
#undef FASTCONV_KERNEL_FILE
