// A planted fault and its right twin as two cases.
#pragma once

#include <string>

#include "cases.h"

namespace fastconv {
namespace testing {

struct Fault {
  using Run = std::function<void(bool broken, uint64_t seed)>;
  Fault(const char* name, Run run) {
    cases().push_back({name, [run](uint64_t seed) { run(true, seed); }});
    cases().push_back({std::string(name) + ".right", [run](uint64_t seed) { run(false, seed); }});
  }
};

}  // namespace testing
}  // namespace fastconv
