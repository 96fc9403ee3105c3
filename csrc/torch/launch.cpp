#include "torch/launch.h"

#include <c10/util/Exception.h>

namespace fastconv {

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
