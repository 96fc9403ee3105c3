// How Hopper's filter gradient cuts its sums into pieces: for many problems, that the pieces have
// every step of every unit once, and that the sum over parts reads each slot that was written, in
// order, and no other.
#include <set>

#include "cases.h"
#include "cuda/conv2d_igemm_sm90_wgrad_work.h"

namespace fastconv {
namespace testing {
namespace {

using cuda::launch_kernel;
using namespace cuda::sm90_wgrad;
using cuda::ceil_div;

constexpr int kLanes = 32;

struct Seen {
  Segment segment;
  int64_t slot;  // among all; -1: none
};

// The segments of each worker, `most` places each, and how many there are.
__global__ void __launch_bounds__(kLanes)
    walk_kernel(Params t, int64_t workers, int most, Seen* seen, int* counts) {
  for (int64_t worker = threadIdx.x; worker < workers; worker += kLanes) {
    Piece piece(t, worker);
    int count = 0;
    for (Segment segment; piece.next(segment); ++count) {
      if (count == most) break;
      const int64_t slot = segment.slot < 0 ? -1 : slot_at(t, worker, segment.slot, 0);
      seen[worker * most + count] = {segment, slot};
    }
    counts[worker] = count;
  }
}

// The slots that the sum of each unit reads, `most` places each; none where a worker has it whole.
__global__ void __launch_bounds__(kLanes)
    parts_kernel(Params t, int most, int64_t* slots, int* counts) {
  for (int64_t unit = threadIdx.x; unit < t.units; unit += kLanes) {
    const Parts parts = parts_of(t, unit);
    int count = 0;
    if (parts.first != parts.last) {
      for (int64_t worker = parts.first; worker <= parts.last && count < most; ++worker) {
        slots[unit * most + count++] = slot_at(t, worker, part_slot(t, unit, worker), 0);
      }
    }
    counts[unit] = count;
  }
}

void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

void check_plan(const Plan& plan) {
  Params t = {};
  t.cluster = plan.cluster();
  t.units = plan.units;
  t.work = plan.units * plan.unit_steps;
  t.steps = static_cast<int>(plan.steps);
  t.unit_steps = static_cast<int>(plan.unit_steps);
  t.worker_steps = static_cast<int>(plan.worker_steps);
  t.pieces = static_cast<int>(plan.pieces());
  const int most_segments = static_cast<int>(plan.worker_steps / plan.unit_steps) + 3;
  const int most_parts = static_cast<int>(plan.unit_steps / plan.worker_steps) + 3;
  Array<Seen> seen(static_cast<size_t>(plan.workers * most_segments));
  Array<int> segment_counts(static_cast<size_t>(plan.workers));
  Array<int64_t> slots(static_cast<size_t>(plan.units * most_parts));
  Array<int> part_counts(static_cast<size_t>(plan.units));
  launch_kernel({"walk", 1, kLanes}, &walk_kernel, t, plan.workers, most_segments, seen.get(),
                segment_counts.get());
  launch_kernel({"parts", 1, kLanes}, &parts_kernel, t, most_parts, slots.get(), part_counts.get());
  const std::vector<Seen> all = seen.read();
  const std::vector<int> counts = segment_counts.read();
  // By unit: where its sum has come to, and the slots of its parts. Workers are in order.
  std::vector<int> reached(static_cast<size_t>(plan.units));
  std::vector<std::vector<int64_t>> written(static_cast<size_t>(plan.units));
  std::set<int64_t> used;
  for (size_t worker = 0; worker < counts.size(); ++worker) {
    expect(counts[worker] > 0 && counts[worker] < most_segments, "a worker's segments");
    for (int i = 0; i < counts[worker]; ++i) {
      const Seen& one = all[worker * static_cast<size_t>(most_segments) + static_cast<size_t>(i)];
      const size_t unit = static_cast<size_t>(one.segment.unit);
      expect(one.segment.steps > 0 && one.segment.first_step == reached[unit], "a gap");
      reached[unit] += one.segment.steps;
      if (one.slot < 0) continue;
      expect(one.slot < plan.slots() && used.insert(one.slot).second, "a slot used twice");
      written[unit].push_back(one.slot);
    }
  }
  const std::vector<int64_t> read = slots.read();
  const std::vector<int> reads = part_counts.read();
  for (size_t unit = 0; unit < reached.size(); ++unit) {
    expect(reached[unit] == plan.steps, "a unit's steps");
    const auto from = read.begin() + static_cast<int64_t>(unit) * most_parts;
    expect(std::vector<int64_t>(from, from + reads[unit]) == written[unit], "a unit's parts");
  }
}

const Register pieces("sm90_wgrad_pieces", [](uint64_t seed) {
  uint64_t state = seed * 2 + 1;
  const auto random = [&state] {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int64_t>(state >> 33);
  };
  const auto one_of = [&](std::initializer_list<int> values) {
    return values.begin()[static_cast<size_t>(random()) % values.size()];
  };
  for (int i = 0; i < 100; ++i) {
    Conv2dProblem p;
    p.N = one_of({1, 3, 16, 64, 256});
    p.C = one_of({8, 64, 128, 512, 1024, 2048});
    p.K = one_of({8, 64, 128, 256, 512, 2048});
    p.R = p.S = one_of({1, 3});
    p.H = p.W = one_of({5, 7, 14, 28});
    p.pad_h = p.pad_w = p.R / 2;
    p.dtype = random() % 2 == 0 ? DType::kBFloat16 : DType::kFloat32;
    p.tf32 = random() % 2 == 0;
    Plan plan = plan_of(p);
    check_plan(plan);
    // Pieces of any length, of several units too.
    plan.unit_steps = plan.steps;
    plan.worker_steps = 1 + plan.units * plan.steps / 300 + random() % (3 * plan.steps);
    plan.workers = ceil_div(plan.units * plan.steps, plan.worker_steps);
    check_plan(plan);
  }
});

}  // namespace
}  // namespace testing
}  // namespace fastconv
