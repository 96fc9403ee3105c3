// What cuda/ptx/cp_async.h means.
#pragma once

#include <cstdint>

namespace fastconv {
namespace emulator {

void cp_async(uint32_t to, const void* from, int bytes, int source_bytes);
void cp_async_commit();
void cp_async_wait(int pending);
void cp_async_wait_all();
void cp_async_mbarrier_arrive_noinc(uint32_t barrier);

}  // namespace emulator
}  // namespace fastconv
