// The choice of a kernel: a pure function of the problem, the device, what the user forced and the
// table. It runs, and is tested, with no GPU.
#pragma once

#include <string>
#include <vector>

#include "core/kernel_table.h"

namespace fastconv {

// What fastconv.winograd(...) allows: F(4x4, 3x3) in fused inference and F(2x2, 3x3) elsewhere, the
// latter everywhere, or neither.
enum class WinogradMode : uint8_t { kFast, kAccurate, kOff };
constexpr const char* name_of(WinogradMode m) {
  return m == WinogradMode::kFast ? "fast" : m == WinogradMode::kAccurate ? "accurate" : "off";
}

// What `with fastconv.backend(...)`, `fastconv.kernel(...)`, `fastconv.allow_fallback(...)` and
// `fastconv.winograd(...)` say.
struct Selection {
  bool backend_forced = false;
  Backend backend = Backend::kCpu;
  std::string kernel;  // empty: none forced. Binds only the op and direction the row belongs to.
  bool allow_fallback = true;
  WinogradMode winograd = WinogradMode::kFast;
};

// Conv2dProblem::winograd for a call. A Winograd row that is forced by name may always run.
uint8_t largest_winograd_tile(const Selection& selection, bool fused_inference);

struct Candidate {
  std::string name;
  std::string reason;  // empty: it could run
  double cost_us = 0;  // when it could run
};

// The cheapest row of `op` and `direction` that can run, or null. With `why`, every row looked at
// is appended, in table order.
template <class K>
const K* choose(const std::vector<K>& rows, const std::string& op, Direction direction,
                const typename K::Problem& problem, const Device& device,
                const Selection& selection, std::vector<Candidate>* why = nullptr);

extern template const Conv2dKernel* choose(const std::vector<Conv2dKernel>&, const std::string&,
                                           Direction, const Conv2dProblem&, const Device&,
                                           const Selection&, std::vector<Candidate>*);
extern template const Pool2dKernel* choose(const std::vector<Pool2dKernel>&, const std::string&,
                                           Direction, const Pool2dProblem&, const Device&,
                                           const Selection&, std::vector<Candidate>*);
extern template const BatchNormKernel* choose(const std::vector<BatchNormKernel>&,
                                              const std::string&, Direction,
                                              const BatchNormProblem&, const Device&,
                                              const Selection&, std::vector<Candidate>*);

}  // namespace fastconv
