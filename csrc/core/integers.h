// Integer arithmetic that every room needs.
#pragma once

#include <cstdint>

namespace fastconv {

constexpr int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }

}  // namespace fastconv
