// How a layer is shared among threads: a pure function of sizes, unit-tested from Python (tests/test_plan.py).
//
// The work is D * slices items (a direction of a slice of the batch). A team of `members` threads takes one item
// after another; inside a team each member owns hidden units and the team meets at a barrier each step. With one
// member there is no barrier at all.
#pragma once

#include "../problem.h"

namespace fusedrnn {

constexpr int kMaxThreads = 256;
// So few rows in all are multiplied by the weights as they lie, in the forward and in the backward pass.
constexpr int64_t kRowsUnpacked = 16, kRowsUnpackedBackward = 10;

struct Plan {
  int teams;
  int members;
  int slices;  // of the batch
};

// gates: blocks of H rows in the weights. lanes: units that a vector holds.
Plan make_plan(const LayerSizes& size, int gates, int lanes, int threads);

// Steps of a chunk of time in which stacked layers of one direction run as a pipeline: a thread takes a layer through a
// chunk while another takes the layer below through the next one. 0: one layer after the other, by all threads.
// size: of the lowest layer.
int64_t pipeline_steps(const LayerSizes& size, int gates, int lanes, int64_t layers, int threads);

// Slice k holds samples [bounds[k], bounds[k + 1]); the slices have nearly equal sums of lengths, none is empty.
void slice_batch(const LayerSizes& size, int slices, int64_t* bounds);

}  // namespace fusedrnn
