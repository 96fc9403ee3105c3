// Warp-wide matrix instructions: their register layouts, and the arithmetic of tensor cores.
#include "emulator/mma.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "core/dtype.h"
#include "emulator/scheduler.h"

namespace fastconv {
namespace emulator {
namespace {

constexpr int kMatrixRowBytes = 16;

float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// All float16 values; to convert one takes longer than to multiply it.
const float* half_values() {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (uint32_t bits = 0; bits < all.size(); ++bits) {
      Half half;
      half.bits = static_cast<uint16_t>(bits);
      all[bits] = static_cast<float>(half);
    }
    return all;
  }();
  return values.data();
}

// What the lanes bring to ldmatrix and stmatrix.
struct Rows {
  uint32_t row;
  uint32_t* registers;
  int matrices;
  bool transposed;
};

// Calls move(register's halves, element in shared memory) for every element of every lane.
template <class Move>
void for_each_element(Rows** lanes, const char* what, Move&& move) {
  const int matrices = lanes[0]->matrices;
  unsigned char* rows[32];
  for (int i = 0; i < 8 * matrices; ++i) {
    rows[i] = shared_at(lanes[i]->row, kMatrixRowBytes, what, kMatrixRowBytes);
    if (&shared_owner(lanes[i]->row, what) != &current_block()) {
      fail(std::string(what) + ": the row lies in another block");
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes[lane]->matrices != matrices || lanes[lane]->transposed != lanes[0]->transposed) {
      fail(std::string(what) + ": the lanes of a warp are at different instructions");
    }
    for (int m = 0; m < matrices; ++m) {
      for (int half = 0; half < 2; ++half) {
        const int first = lane / 4, second = 2 * (lane % 4) + half;
        const int row = lanes[0]->transposed ? second : first;
        const int column = lanes[0]->transposed ? first : second;
        auto* halves = reinterpret_cast<unsigned char*>(&lanes[lane]->registers[m]);
        move(halves + 2 * half, rows[8 * m + row] + 2 * column);
      }
    }
  }
}

}  // namespace

void ldmatrix(uint32_t* to, int matrices, bool transposed, uint32_t row) {
  Rows mine = {row, to, matrices, transposed};
  meet_full_warp("ldmatrix", mine, [](Rows** lanes) {
    for_each_element(lanes, "ldmatrix", [](unsigned char* in_register, const unsigned char* at) {
      std::memcpy(in_register, at, 2);
    });
  });
}

void stmatrix(uint32_t row, int matrices, bool transposed, const uint32_t* from) {
  Rows mine = {row, const_cast<uint32_t*>(from), matrices, transposed};
  meet_full_warp("stmatrix", mine, [](Rows** lanes) {
    for_each_element(lanes, "stmatrix", [](const unsigned char* in_register, unsigned char* at) {
      std::memcpy(at, in_register, 2);
    });
  });
}

float element_of(MmaType type, const uint32_t* registers, int i) {
  if (type == MmaType::kTf32) return float_of_bits(registers[i] & 0xffffe000u);
  const uint32_t bits = registers[i / 2] >> (16 * (i % 2)) & 0xffffu;
  return type == MmaType::kBFloat16 ? float_of_bits(bits << 16) : half_values()[bits];
}

namespace {

std::atomic<bool> truncates{false};

float rounded(double x, bool towards_zero) {
  const float nearest = static_cast<float>(x);
  if (!towards_zero || !(std::fabs(static_cast<double>(nearest)) > std::fabs(x))) return nearest;
  return std::nextafter(nearest, 0.0f);
}

}  // namespace

bool set_truncation(bool on) { return truncates.exchange(on); }

void multiply_add(int rows, int columns, int k, const float* a, const float* b, float* d) {
  // Vectors by hand: the emulator is compiled for speed of compiling, and this is its inner loop.
  using Four = double __attribute__((vector_size(32)));
  using FourFloats = float __attribute__((vector_size(16)));
  constexpr int kMostColumns = 256;
  Four sum[kMostColumns / 4];
  const int fours = columns / 4;
  const bool truncating = truncates;
  for (int row = 0; row < rows; ++row) {
    for (int j = 0; j < fours; ++j) sum[j] = Four{};
    for (int i = 0; i < k; ++i) {
      const double factor = a[row * k + i];
      for (int j = 0; j < fours; ++j) {
        FourFloats line;
        std::memcpy(&line, b + i * columns + 4 * j, sizeof(line));
        sum[j] += factor * __builtin_convertvector(line, Four);
      }
    }
    for (int j = 0; j < fours; ++j) {
      float* const to = d + row * columns + 4 * j;
      for (int e = 0; e < 4; ++e) to[e] = rounded(sum[j][e] + to[e], truncating);
    }
  }
}

void mma(MmaType type, int k, float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  struct Operands {
    MmaType type;
    int k;
    float* d;
    const uint32_t *a, *b;
    const float* c;
  } mine = {type, k, d, a, b, c};
  meet_full_warp("mma.sync", mine, [type, k](Operands** lanes) {
    float a_matrix[16 * 16], b_matrix[16 * 8], d_matrix[16 * 8];
    // Elements a lane holds next to each other along K, and lanes of a row of A: 4.
    const int pair = type == MmaType::kTf32 ? 1 : 2;
    for (int lane = 0; lane < 32; ++lane) {
      const Operands& o = *lanes[lane];
      if (o.type != type || o.k != k) fail("mma.sync: the lanes are at different instructions");
      const int group = lane / 4, t = lane % 4;
      for (int i = 0; i < 16 * k / 32; ++i) {
        const int row = group + 8 * (i / pair % 2);
        const int column = pair * t + i % pair + 4 * pair * (i / (2 * pair));
        a_matrix[row * k + column] = element_of(type, o.a, i);
      }
      for (int i = 0; i < 8 * k / 32; ++i) {
        const int row = pair * t + i % pair + 4 * pair * (i / pair);
        b_matrix[row * 8 + group] = element_of(type, o.b, i);
      }
      for (int i = 0; i < 4; ++i) {
        d_matrix[(group + 8 * (i / 2)) * 8 + 2 * t + i % 2] = o.c[i];
      }
    }
    multiply_add(16, 8, k, a_matrix, b_matrix, d_matrix);
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        lanes[lane]->d[i] = d_matrix[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2];
      }
    }
  });
}

uint32_t round_to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7fffe000u;
  if (std::isinf(x)) return bits;
  return (bits + 0x1000u) & 0xffffe000u;  // to the magnitude's nearest, ties away from zero
}

}  // namespace emulator
}  // namespace fastconv
