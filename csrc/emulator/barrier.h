// What cuda/ptx/barrier.h, cluster.h and setmaxnreg.h mean.
#pragma once

#include <cstdint>

namespace fastconv {
namespace emulator {

void named_barrier_sync(int id, int threads);
void named_barrier_arrive(int id, int threads);
bool elect_one();

uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive();
void cluster_wait();
uint32_t mapa(uint32_t address, uint32_t rank);
void load_cluster(uint32_t address, void* to, int64_t bytes);
void store_cluster(uint32_t address, const void* from, int64_t bytes);
// Fails when `address` lies in another block that may not have started or has ended.
void check_reachable(uint32_t address, const char* what);
// Its block has threads left: memory of one that has ended may be another's already.
void check_not_ended(uint32_t address, const char* what);

void setmaxnreg(int registers, bool more);

}  // namespace emulator
}  // namespace fastconv
