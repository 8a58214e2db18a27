// See plan.h. The thresholds are readings at two threads (docs/performance.md).
#include "plan.h"

#include <algorithm>

namespace fusedrnn {

Plan make_plan(const LayerSizes& size, int gates, int lanes, int threads) {
  // Below this many multiply-adds a thread is not worth waking.
  constexpr int64_t kWorkPerThread = 1 << 18;
  // And a member's step below this is not worth a meeting.
  constexpr int64_t kWorkPerMeeting = 1 << 13;
  const int64_t work = size.N * size.D * gates * size.H * (size.I + size.R);
  const int64_t useful = std::max<int64_t>(1, work / kWorkPerThread);
  const int n = static_cast<int>(std::min<int64_t>({threads, useful, kMaxThreads}));
  if (n == 1) return {1, 1, 1};

  // Directions are independent: give each its own threads where they divide evenly.
  const int per_direction = n % size.D == 0 ? n / size.D : n;
  const bool small_cell = size.H <= 64 && size.B >= per_direction;
  const bool large_batch = size.H <= 256 && size.B >= 4 * per_direction;
  if (per_direction == 1 || small_cell || large_batch) {
    const int slices = per_direction;
    return {std::min(n, slices * size.D), 1, slices};
  }
  const int64_t vectors = (size.H + lanes - 1) / lanes;
  const int64_t meetings_worth = std::max<int64_t>(1, work / (size.T * size.D) / kWorkPerMeeting);
  const int members = static_cast<int>(std::min<int64_t>({per_direction, vectors, meetings_worth}));
  return {std::max(1, std::min(n / members, size.D)), members, 1};
}

int64_t pipeline_steps(const LayerSizes& size, int gates, int64_t layers, int threads) {
  constexpr int64_t kWorkPerStep = 1 << 16;  // multiply-adds; above it threads that share a step are as fast
  constexpr int64_t kFewest = 8, kMost = 32, kChunks = 8;
  const int64_t work = size.B * gates * size.H * (size.H + size.R);
  if (layers < 2 || threads < 2 || size.D > 1 || size.T < 2 * kFewest || work > kWorkPerStep) return 0;
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
    while (low < high) {                                           // the first b with enough rows before it
      const int64_t mid = low + (high - low) / 2;
      if (rows_before(mid) * slices >= size.N * k) high = mid;
      else low = mid + 1;
    }
    bounds[k] = low;
  }
}

}  // namespace fusedrnn
