// griddepcontrol: a kernel launched with Launch::overlap_previous starts while the stream's
// previous one still runs. PTX ISA, "Parallel Synchronization: griddepcontrol". sm_90; before,
// nothing overlaps and both do nothing.
//
// The emulator runs launch after launch: both do nothing there too.
#pragma once

#include "cuda/ptx/target.h"

namespace fastconv {
namespace ptx {

// Returns when the previous kernel has ended and its writes are seen; at once where it is over.
__device__ inline void griddepcontrol_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start once every block has said so or ended.
__device__ inline void griddepcontrol_launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace ptx
}  // namespace fastconv
