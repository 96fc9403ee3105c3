// Cases of a test program that runs on the emulator and, compiled by nvcc, on a GPU: each registers
// itself under a name; cases.cu has main().
#pragma once

#include <cstdint>
#include <functional>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/element.h"
#include "cuda/launch.h"

namespace fastconv {
namespace testing {

struct Case {
  std::string name;
  std::function<void(uint64_t seed)> run;  // throws what it finds wrong
};
std::vector<Case>& cases();

struct Register {
  Register(const char* name, std::function<void(uint64_t)> run) {
    cases().push_back({name, std::move(run)});
  }
};

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// An array on the device, filled from the host, read back after all launches.
template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& values) : count_(values.size()) {
    check(cudaMalloc(reinterpret_cast<void**>(&at_), bytes()));
    check(cudaMemcpy(at_, values.data(), bytes(), cudaMemcpyHostToDevice));
  }
  // Of what no result is: every byte 0x7b.
  explicit Array(size_t count) : count_(count) {
    check(cudaMalloc(reinterpret_cast<void**>(&at_), bytes()));
    check(cudaMemset(at_, 0x7b, bytes()));
  }
  ~Array() { cudaFree(at_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* get() const { return at_; }
  std::vector<T> read() const {
    check(cudaDeviceSynchronize());
    std::vector<T> values(count_);
    check(cudaMemcpy(values.data(), at_, bytes(), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  size_t bytes() const { return count_ * sizeof(T); }
  T* at_ = nullptr;
  size_t count_;
};

// Integers of -2 to 2: sums of their products are exact in every type, in any order.
template <class T>
std::vector<T> small_integers(size_t count, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<T> values(count);
  for (T& value : values) value = T(static_cast<float>(random() % 5) - 2.0f);
  return values;
}

inline std::string shown(float x) { return std::to_string(x); }
template <class T>
std::string shown(T x) {
  return std::to_string(static_cast<double>(static_cast<float>(x)));
}

template <class T>
void expect_equal(const std::vector<T>& got, const std::vector<T>& want, const std::string& what) {
  if (got.size() != want.size()) throw std::runtime_error(what + ": sizes differ");
  size_t wrong = 0, first = 0;
  for (size_t i = got.size(); i-- > 0;) {
    if (static_cast<float>(got[i]) == static_cast<float>(want[i])) continue;
    ++wrong;
    first = i;
  }
  if (wrong == 0) return;
  throw std::runtime_error(what + ": " + std::to_string(wrong) + " of " +
                           std::to_string(got.size()) + " wrong, [" + std::to_string(first) +
                           "] is " + shown(got[first]) + " for " + shown(want[first]));
}

inline void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// Runs `f`, which must throw something whose text has `part`.
template <class F>
void expect_throws(const std::string& part, F&& f) {
  try {
    f();
  } catch (const std::exception& error) {
    if (std::string(error.what()).find(part) != std::string::npos) return;
    throw std::runtime_error("expected \"" + part + "\" in: " + error.what());
  }
  throw std::runtime_error("nothing was thrown, expected \"" + part + "\"");
}

}  // namespace testing
}  // namespace fastconv
