#include "torch/launch.h"

#include <c10/util/Exception.h>

#include <utility>

namespace fastconv {
namespace {

constexpr size_t kLine = 64;                   // bytes of a cache line, and of an AVX-512 vector
constexpr size_t kMostKept = size_t{1} << 26;  // ResNet's and VGG's need 10 MB
thread_local HostMemory of_last_launch;

}  // namespace

LaunchMemory::LaunchMemory(size_t bytes, const at::Tensor& like, bool keep) {
  if (bytes == 0) return;
  if (!keep) {
    fresh_ = at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
    data_ = fresh_.mutable_data_ptr();
    return;
  }
  kept_ = std::exchange(of_last_launch, {});  // a launch inside this one would find none
  if (kept_.bytes < bytes) {
    kept_ = {};
    const size_t whole = (bytes + kLine - 1) / kLine * kLine;
    kept_ = {std::unique_ptr<void, Free>(std::aligned_alloc(kLine, whole)), whole};
    TORCH_CHECK(kept_.data, "fastconv: cannot allocate ", bytes, " bytes to work in");
  }
  data_ = kept_.data.get();
}

LaunchMemory::~LaunchMemory() {
  if (kept_.bytes > of_last_launch.bytes && kept_.bytes <= kMostKept) {
    of_last_launch = std::move(kept_);
  }
}

Selection& current_selection() {
  thread_local Selection selection;
  return selection;
}

bool aten_is_forced() {
  const Selection& s = current_selection();
  return s.backend_forced && s.backend == Backend::kAten;
}

void require_fallback_allowed(const std::string& what, const std::string& why, bool kernel_forced) {
  const Selection& s = current_selection();
  if (s.backend_forced && s.backend == Backend::kAten) return;
  TORCH_CHECK(!kernel_forced, "fastconv: kernel ", s.kernel, " is forced and cannot run ", what,
              ": ", why);
  TORCH_CHECK(!s.backend_forced, "fastconv: backend ", name_of(s.backend),
              " is forced and cannot run ", what, ": ", why);
  TORCH_CHECK(s.allow_fallback, "fastconv: ", what,
              " would fall back to ATen, which allow_fallback(False) forbids: ", why);
}

void require_fallback_allowed(const std::string& op, const at::Tensor& input) {
  if (aten_is_forced() || !input.defined()) return;  // undefined: ATen says what is wrong
  std::string why = std::string("no kernel takes ") + c10::toString(input.scalar_type());
  if (input.layout() != at::kStrided) why += " in a tensor that is not strided";
  why += " on " + input.device().str();
  require_fallback_allowed(op, why, /*kernel_forced=*/false);
}

std::string describe(const std::vector<Candidate>& candidates) {
  if (candidates.empty()) return "there is no kernel for it";
  std::string text;
  for (const Candidate& c : candidates) {
    if (!text.empty()) text += "; ";
    text += c.name + ": " + (c.reason.empty() ? "can run" : c.reason);
  }
  return text;
}

}  // namespace fastconv
