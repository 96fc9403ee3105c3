// The calling thread's `with fastconv.backend(...)`, `kernel(...)`, `allow_fallback(...)` and
// `winograd(...)`.
#pragma once

#include <utility>

#include "core/choose.h"

namespace fastconv {

Selection& current_selection();

class SelectionGuard {
 public:
  explicit SelectionGuard(Selection selection)
      : saved_(std::exchange(current_selection(), std::move(selection))) {}
  ~SelectionGuard() { current_selection() = std::move(saved_); }
  SelectionGuard(const SelectionGuard&) = delete;
  SelectionGuard& operator=(const SelectionGuard&) = delete;

 private:
  Selection saved_;
};

}  // namespace fastconv
