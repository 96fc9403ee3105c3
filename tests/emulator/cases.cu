// main() of the test programs: `program` lists the cases, `program CASE SEED` runs one and
// `program all SEED` all of them. The exit status is 0 where all is right; what is not is told on
// stderr.
#include "cases.h"

#include <cstdlib>
#include <iostream>

#ifdef FASTCONV_EMULATOR
#include "emulator/launch.h"
#endif

namespace fastconv {
namespace testing {

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

namespace {

bool passes(const Case& one, uint64_t seed) {
#ifdef FASTCONV_EMULATOR
  emulator::set_seed(seed);
#endif
  try {
    one.run(seed);
    return true;
  } catch (const std::exception& error) {
    std::cerr << one.name << ", seed " << seed << ": " << error.what() << std::endl;
    return false;
  }
}

int run(int argc, char** argv) {
  if (argc == 1) {
    for (const Case& one : cases()) std::cout << one.name << "\n";
    return 0;
  }
  const std::string wanted = argv[1];
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  bool found = false, right = true;
  for (const Case& one : cases()) {
    if (wanted != "all" && wanted != one.name) continue;
    found = true;
    right = passes(one, seed) && right;
  }
  if (!found) std::cerr << "no case " << wanted << std::endl;
  return found && right ? 0 : 1;
}

}  // namespace
}  // namespace testing
}  // namespace fastconv

int main(int argc, char** argv) { return fastconv::testing::run(argc, argv); }
