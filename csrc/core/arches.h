// Which GPUs a build's kernels run on, from the list it was compiled for (TORCH_CUDA_ARCH_LIST).
#pragma once

#include <string>

namespace fastconv {

// Empty when a card of compute capability `sm_arch` (90 for 9.0) runs what was built for `built`,
// for example "8.0;9.0+PTX"; otherwise a sentence that names `card`. Machine code runs on later
// minor versions of its major one ("9.0a": on 9.0 alone; "10.0f": on 10.x), PTX on everything
// later. A name that is no version ("Hopper") is taken to fit.
std::string refuse_architecture(const std::string& built, int sm_arch, const std::string& card);

}  // namespace fastconv
