// distances = pooled @ weight.T + bias, and the margin and label of each row of them.
#pragma once

#include <cstdint>

namespace dgate_rt {

// Sizes of one piece of work: a tile of samples against a block of classes.
constexpr int64_t kTile = 16;
constexpr int64_t kClassBlock = 64;

struct Linear {
  const float* weight;  // [classes, width]
  const float* bias;    // [classes]
  int64_t classes;
  int64_t width;
};

// Distances of samples 0..samples-1 (at most kTile) to classes first..last-1 (at most kClassBlock), each sample's
// summed in an order of its own: its place in the tile, and who else is in it, do not change a bit.
void tile_distances(const Linear& gate, const float* pooled, int64_t pooled_stride, int64_t samples, int64_t first,
                    int64_t last, float* distances /* [samples, classes] */);

enum class Criterion { kMargin, kSoftmax, kEntropy };

// The largest distance, or what the criterion makes of them all, and the lowest class that attains the largest; with a
// NaN among them, NaN and the lowest class that is NaN.
void confidence_and_label(const float* distances, int64_t classes, Criterion criterion, float* confidence,
                          int64_t* label);

}  // namespace dgate_rt
