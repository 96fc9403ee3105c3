// What cuda/ptx/mbarrier.h means.
#pragma once

#include <cstdint>

namespace fastconv {
namespace emulator {

struct Block;

void mbarrier_init(uint32_t barrier, uint32_t arrivals);
void mbarrier_inval(uint32_t barrier);
void mbarrier_arrive(uint32_t barrier);
// When copies have landed: no thread is running then.
void mbarrier_arrive_after_copies(uint32_t barrier);
void mbarrier_arrive_remote(uint32_t barrier);
void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes);
void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity);
// The mbarriers that the running thread has initialised may now be used by copies and by other
// blocks.
void publish_mbarriers();

// For copies: that `barrier` may be used by the asynchronous proxy, and that bytes have landed.
void mbarrier_check_for_copy(uint32_t barrier, const char* what);
void mbarrier_complete_tx(uint32_t barrier, int64_t bytes, const char* what);

}  // namespace emulator
}  // namespace fastconv
