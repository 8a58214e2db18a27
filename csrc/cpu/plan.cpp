// See plan.h. The thresholds are readings at two threads (docs/performance.md).
#include "plan.h"

#include <algorithm>
#include <cmath>

namespace fusedrnn {
namespace {

// A meeting of m members takes m - 1 times that of two, as each reads the flags of all others. In multiply-adds:
constexpr int64_t kMeeting = 1 << 13;

// How many members share a step of so many multiply-adds: work / m + kMeeting * (m - 1) is least at the square root.
// Two, if each has kMeeting.
int64_t members_worth(int64_t work) {
  const auto best = static_cast<int64_t>(std::sqrt(static_cast<double>(work) / kMeeting));
  return std::max<int64_t>(work >= 2 * kMeeting ? 2 : 1, best);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Plan make_plan(const LayerSizes& size, int gates, int lanes, int threads) {
  // Below this many multiply-adds a thread is not worth waking.
  constexpr int64_t kWorkPerThread = 1 << 18;
  const int64_t work = size.N * size.D * gates * size.H * (size.I + size.R);
  const int64_t useful = std::max<int64_t>(1, work / kWorkPerThread);
  const int n = static_cast<int>(std::min<int64_t>({threads, useful, kMaxThreads}));
  if (n == 1) return {1, 1, 1};

  // Directions are independent: give each its own threads where they divide evenly.
  const int64_t per_direction = n % size.D == 0 ? n / size.D : n;
  // A slice with fewer samples would not use the weights it reads, least where W_hh does not stay in the second-level
  // cache (as float32). Above H = 256 teams are as fast with two threads, and need one sum of the weight gradients, not
  // one a slice.
  constexpr int64_t kWeightsCached = 1 << 16;
  const int64_t fewest_large = gates * size.H * size.R <= kWeightsCached ? 3 : 4;
  const int64_t fewest = size.H <= 64 ? 1 : fewest_large;
  const int64_t slices_worth = size.B / fewest;
  if (per_direction == 1 || (size.H <= 256 && slices_worth >= per_direction)) {
    const int slices = static_cast<int>(per_direction);
    return {std::min(n, slices * size.D), 1, slices};
  }
  // One team, or more of them with slices of their own where that gains an eighth: the units do not keep many threads
  // busy, or their meetings take too long.
  const int64_t vectors = ceil_div(size.H, lanes), step = work / (size.T * size.D);
  int64_t slices = 1, members = 1, least = 0;
  for (int64_t s = 1; s <= std::max<int64_t>(1, std::min<int64_t>(slices_worth, per_direction)); ++s) {
    const int64_t m = std::min({per_direction / s, vectors, members_worth(step / s)});
    const int64_t own = step * ceil_div(size.B, s) / size.B * ceil_div(vectors, m) / vectors;
    const int64_t cost = own + kMeeting * (m - 1);
    if (s == 1 || cost < least - least / 8) slices = s, members = m, least = cost;
  }
  const int teams = static_cast<int>(std::max<int64_t>(1, std::min(n / members, size.D * slices)));
  return {teams, static_cast<int>(members), static_cast<int>(slices)};
}

int64_t pipeline_steps(const LayerSizes& size, int gates, int lanes, int64_t layers, int threads) {
  constexpr int64_t kWorkPerStep = 1 << 16;  // multiply-adds; above it threads that share a step are as fast
  constexpr int64_t kFewest = 8, kMost = 32, kChunks = 8;
  const int64_t work = size.B * gates * size.H * (size.H + size.R);
  if (layers < 2 || threads < 2 || size.D > 1 || size.T < 2 * kFewest || work > kWorkPerStep) return 0;
  // A layer by itself may keep more threads busy than there are layers.
  const Plan plan = make_plan(size, gates, lanes, threads);
  if (plan.teams * plan.members > std::min<int64_t>(threads, layers)) return 0;
  return std::clamp(size.T / kChunks, kFewest, kMost);
}

void slice_batch(const LayerSizes& size, int slices, int64_t* bounds) {
  // length[b] = number of steps with active[t] > b; the prefix sum of lengths is found step by step.
  const auto rows_before = [&](int64_t b) {
    int64_t rows = 0;
    for (int64_t t = 0; t < size.T; ++t) rows += std::min(size.active[t], b);
    return rows;
  };
  if (size.N == size.T * size.B) {  // all lengths equal
    for (int k = 0; k <= slices; ++k) bounds[k] = size.B * k / slices;
    return;
  }
  bounds[0] = 0;
  bounds[slices] = size.B;
  for (int k = 1; k < slices; ++k) {
    int64_t low = bounds[k - 1] + 1, high = size.B - (slices - k);  // leave a sample for every slice
    while (low < high) {                                            // the first b with enough rows before it
      const int64_t mid = low + (high - low) / 2;
      if (rows_before(mid) * slices >= size.N * k) high = mid;
      else low = mid + 1;
    }
    bounds[k] = low;
  }
}

}  // namespace fusedrnn
