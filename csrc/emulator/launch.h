// What a host asks of the emulator besides launching: the seed of its schedules, and the log.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastconv {
namespace emulator {

// Every launch of one seed is scheduled alike, whatever ran before it.
void set_seed(uint64_t seed);
uint64_t seed();

struct LogEntry {
  std::string name;
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster;
};
// Launches from now on are kept until stop_log() hands them over.
void start_log();
std::vector<LogEntry> stop_log();

// The GPU that is emulated, an H200. With fewer SMs a persistent kernel's block has many tiles
// where a small problem would leave it one.
constexpr int kSmArch = 90;
constexpr int kSmCount = 132;
void set_sm_count(int count);
int sm_count();
constexpr int64_t kSharedMemoryPerBlock = 227 * 1024;

}  // namespace emulator
}  // namespace fastconv
