// What cuda/ptx/mma.h and ldmatrix.h mean, and the arithmetic of tensor cores.
#pragma once

#include <cstdint>

namespace fastconv {
namespace emulator {

enum class MmaType { kBFloat16, kFloat16, kTf32 };

void ldmatrix(uint32_t* to, int matrices, bool transposed, uint32_t row);
void stmatrix(uint32_t row, int matrices, bool transposed, const uint32_t* from);
void mma(MmaType type, int k, float* d, const uint32_t* a, const uint32_t* b, const float* c);
uint32_t round_to_tf32(float x);

// The value of element `i` of 32-bit registers that hold two 16-bit elements or one of TF32, whose
// low 13 bits tensor cores ignore.
float element_of(MmaType type, const uint32_t* registers, int i);

// d [rows x columns] += a [rows x k] * b [k x columns], all dense, columns a multiple of 4 and
// at most 256. Products of such elements are exact in float64; those of one instruction and the
// accumulator are added in float64 and rounded to float32 once: to nearest, or, since hardware may,
// towards zero where set_truncation() asks for that. Code that depends on either is wrong.
bool set_truncation(bool on);  // what it was
void multiply_add(int rows, int columns, int k, const float* a, const float* b, float* d);

}  // namespace emulator
}  // namespace fastconv
