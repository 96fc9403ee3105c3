// The assembly of wgmma.mma_async. One instruction names all its accumulators, N / 2 registers, so
// there is one text for each N; what follows spells the operand lists once. For wgmma.h alone.
#pragma once

// "%0, %1, ..." up to N / 2 - 1.
#define FASTCONV_WGMMA_D8 "%0, %1, %2, %3"
#define FASTCONV_WGMMA_D16 \
  FASTCONV_WGMMA_D8        \
  ", "                     \
  "%4, %5, %6, %7"
#define FASTCONV_WGMMA_D32 \
  FASTCONV_WGMMA_D16       \
  ", "                     \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define FASTCONV_WGMMA_D64 \
  FASTCONV_WGMMA_D32       \
  ", "                     \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTCONV_WGMMA_D96 \
  FASTCONV_WGMMA_D64       \
  ", "                     \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTCONV_WGMMA_D128 \
  FASTCONV_WGMMA_D96        \
  ", "                      \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTCONV_WGMMA_D192                                                          \
  FASTCONV_WGMMA_D128                                                                \
  ", "                                                                               \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTCONV_WGMMA_D256                                                          \
  FASTCONV_WGMMA_D192                                                                \
  ", "                                                                               \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "   \
  "%123, %124, %125, %126, %127"

// The accumulators as operands.
#define FASTCONV_WGMMA_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FASTCONV_WGMMA_F16(i)                                               \
  FASTCONV_WGMMA_F4(i), FASTCONV_WGMMA_F4(i + 4), FASTCONV_WGMMA_F4(i + 8), \
      FASTCONV_WGMMA_F4(i + 12)
#define FASTCONV_WGMMA_OUT8 FASTCONV_WGMMA_F4(0)
#define FASTCONV_WGMMA_OUT16 FASTCONV_WGMMA_F4(0), FASTCONV_WGMMA_F4(4)
#define FASTCONV_WGMMA_OUT32 FASTCONV_WGMMA_F16(0)
#define FASTCONV_WGMMA_OUT64 FASTCONV_WGMMA_OUT32, FASTCONV_WGMMA_F16(16)
#define FASTCONV_WGMMA_OUT96 FASTCONV_WGMMA_OUT64, FASTCONV_WGMMA_F16(32)
#define FASTCONV_WGMMA_OUT128 FASTCONV_WGMMA_OUT96, FASTCONV_WGMMA_F16(48)
#define FASTCONV_WGMMA_OUT192 FASTCONV_WGMMA_OUT128, FASTCONV_WGMMA_F16(64), FASTCONV_WGMMA_F16(80)
#define FASTCONV_WGMMA_OUT256 FASTCONV_WGMMA_OUT192, FASTCONV_WGMMA_F16(96), FASTCONV_WGMMA_F16(112)

// shape_types: "k16.f32.bf16.bf16"; p, a, b, ...: the operand numbers that follow N / 2
// accumulators. TF32 has no transposition.
#define FASTCONV_WGMMA_SS(N, shape_types, a, b, s)                                               \
  FASTCONV_ASM_SM90A("{\n.reg .pred p;\nsetp.ne.b32 p, %" #s                                     \
                     ", 0;\n"                                                                    \
                     "wgmma.mma_async.sync.aligned.m64n" #N shape_types " {" FASTCONV_WGMMA_D##N \
                     "}, %" #a ", %" #b ", p, 1, 1;\n}" : FASTCONV_WGMMA_OUT##N : "l"(a_matrix), \
                     "l"(b_matrix), "r"(accumulate))
#define FASTCONV_WGMMA_SS_MAJOR(N, shape_types, a, b, s, ta, tb)                                 \
  FASTCONV_ASM_SM90A("{\n.reg .pred p;\nsetp.ne.b32 p, %" #s                                     \
                     ", 0;\n"                                                                    \
                     "wgmma.mma_async.sync.aligned.m64n" #N shape_types " {" FASTCONV_WGMMA_D##N \
                     "}, %" #a ", %" #b ", p, 1, 1, %" #ta ", %" #tb                             \
                     ";\n}" : FASTCONV_WGMMA_OUT##N : "l"(a_matrix),                             \
                     "l"(b_matrix), "r"(accumulate), "n"(kMnMajorA), "n"(kMnMajorB))
#define FASTCONV_WGMMA_RS(N, shape_types, a0, a1, a2, a3, b, s)                                  \
  FASTCONV_ASM_SM90A("{\n.reg .pred p;\nsetp.ne.b32 p, %" #s                                     \
                     ", 0;\n"                                                                    \
                     "wgmma.mma_async.sync.aligned.m64n" #N shape_types " {" FASTCONV_WGMMA_D##N \
                     "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b                         \
                     ", p, 1, 1;\n}" : FASTCONV_WGMMA_OUT##N : "r"(a[0]),                        \
                     "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_matrix), "r"(accumulate))
#define FASTCONV_WGMMA_RS_MAJOR(N, shape_types, a0, a1, a2, a3, b, s, tb)                        \
  FASTCONV_ASM_SM90A("{\n.reg .pred p;\nsetp.ne.b32 p, %" #s                                     \
                     ", 0;\n"                                                                    \
                     "wgmma.mma_async.sync.aligned.m64n" #N shape_types " {" FASTCONV_WGMMA_D##N \
                     "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1, %" #tb      \
                     ";\n}" : FASTCONV_WGMMA_OUT##N : "r"(a[0]),                                 \
                     "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_matrix), "r"(accumulate),            \
                     "n"(kMnMajorB))

// The three element types of one N.
#define FASTCONV_WGMMA_SS_TYPES(N, a, b, s, ta, tb)                   \
  if constexpr (std::is_same_v<T, __half>) {                          \
    FASTCONV_WGMMA_SS_MAJOR(N, "k16.f32.f16.f16", a, b, s, ta, tb);   \
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {            \
    FASTCONV_WGMMA_SS_MAJOR(N, "k16.f32.bf16.bf16", a, b, s, ta, tb); \
  } else {                                                            \
    FASTCONV_WGMMA_SS(N, "k8.f32.tf32.tf32", a, b, s);                \
  }
#define FASTCONV_WGMMA_RS_TYPES(N, a0, a1, a2, a3, b, s, tb)                   \
  if constexpr (std::is_same_v<T, __half>) {                                   \
    FASTCONV_WGMMA_RS_MAJOR(N, "k16.f32.f16.f16", a0, a1, a2, a3, b, s, tb);   \
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {                     \
    FASTCONV_WGMMA_RS_MAJOR(N, "k16.f32.bf16.bf16", a0, a1, a2, a3, b, s, tb); \
  } else {                                                                     \
    FASTCONV_WGMMA_RS(N, "k8.f32.tf32.tf32", a0, a1, a2, a3, b, s);            \
  }
