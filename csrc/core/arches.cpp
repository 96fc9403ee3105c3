#include "core/arches.h"

#include <cctype>
#include <sstream>

namespace fastconv {
namespace {

// "9.0a+PTX" as 90, 'a', true; 0 for anything else.
struct Arch {
  int version = 0;
  char suffix = 0;
  bool ptx = false;

  explicit Arch(const std::string& text) {
    std::istringstream in(text);
    int major = 0, minor = 0;
    char dot = 0;
    if (!(in >> major >> dot >> minor) || dot != '.' || major < 1 || minor < 0 || minor > 9) return;
    if (std::islower(in.peek())) suffix = static_cast<char>(in.get());
    std::string rest;
    in >> rest;
    ptx = rest == "+PTX";
    if (rest.empty() || ptx) version = 10 * major + minor;
  }
  bool runs_on(int sm_arch) const {
    const bool same_major = version / 10 == sm_arch / 10;
    if (suffix == 'a') return version == sm_arch;
    if (suffix == 'f') return same_major && version <= sm_arch;
    return version <= sm_arch && (ptx || same_major);
  }
};

}  // namespace

std::string refuse_architecture(const std::string& built, int sm_arch, const std::string& card) {
  std::string spaced = built;
  for (char& c : spaced) c = c == ';' || c == ',' ? ' ' : c;
  std::istringstream tokens(spaced);
  bool any = false;
  for (std::string token; tokens >> token;) {
    const Arch arch(token);
    if (arch.version == 0 || arch.runs_on(sm_arch)) return {};
    any = true;
  }
  if (!any) return {};
  return card + " has compute capability " + std::to_string(sm_arch / 10) + "." +
         std::to_string(sm_arch % 10) + ", and fastconv's CUDA kernels were built for " + built;
}

}  // namespace fastconv
