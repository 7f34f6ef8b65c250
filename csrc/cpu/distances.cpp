#include "distances.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace dgate_rt {
namespace {

constexpr int64_t kDepth =
    256;  // width of the slice that is transposed at a time: 16 KiB, within the first-level cache
constexpr int64_t kClasses = 4;  // classes that share one read of the slice

// partial[k][s] = sum over c of weight[k][c] * slice[c][s]
template <int64_t classes>
DGATE_INLINE void multiply(const float* weight, int64_t weight_stride, const float* slice, int64_t depth,
                           float* totals) {
  float partial[classes][kTile] = {};
  for (int64_t c = 0; c < depth; ++c) {
    for (int64_t k = 0; k < classes; ++k) {
      const float w = weight[k * weight_stride + c];
#pragma omp simd
      for (int64_t s = 0; s < kTile; ++s) partial[k][s] += w * slice[c * kTile + s];
    }
  }
  for (int64_t k = 0; k < classes; ++k) {
    for (int64_t s = 0; s < kTile; ++s) totals[k * kTile + s] += partial[k][s];
  }
}

DGATE_INLINE void transpose(const float* pooled, int64_t stride, int64_t samples, int64_t depth, float* slice) {
  for (int64_t s = 0; s < samples; ++s) {
    for (int64_t c = 0; c < depth; ++c) slice[c * kTile + s] = pooled[s * stride + c];
  }
}

}  // namespace

DGATE_CLONES void tile_distances(const Linear& gate, const float* pooled, int64_t pooled_stride, int64_t samples,
                                 int64_t first, int64_t last, float* distances) {
  alignas(64) float slice[kDepth * kTile] = {};  // samples that are not there stay zero
  alignas(64) float totals[kClassBlock * kTile] = {};
  for (int64_t start = 0; start < gate.width; start += kDepth) {
    const int64_t depth = std::min(kDepth, gate.width - start);
    transpose(pooled + start, pooled_stride, samples, depth, slice);
    int64_t k = first;
    for (; k + kClasses <= last; k += kClasses) {
      multiply<kClasses>(gate.weight + k * gate.width + start, gate.width, slice, depth, totals + (k - first) * kTile);
    }
    for (; k < last; ++k) {
      multiply<1>(gate.weight + k * gate.width + start, gate.width, slice, depth, totals + (k - first) * kTile);
    }
  }
  for (int64_t s = 0; s < samples; ++s) {
    for (int64_t k = first; k < last; ++k) {
      distances[s * gate.classes + k] = totals[(k - first) * kTile + s] + gate.bias[k];
    }
  }
}

void confidence_and_label(const float* distances, int64_t classes, Criterion criterion, float* confidence,
                          int64_t* label) {
  int64_t best = 0;
  for (int64_t k = 0; k < classes; ++k) {
    if (distances[k] != distances[k]) {
      best = k;
      break;
    }
    if (distances[k] > distances[best]) best = k;
  }
  const float margin = distances[best];
  *label = best;
  *confidence = margin;
  if (criterion == Criterion::kMargin) return;
  float total = 0, weighted = 0;  // of the weights exp(distance - margin); NaN where the margin is not finite
  for (int64_t k = 0; k < classes; ++k) {
    const float shifted = distances[k] - margin, weight = std::exp(shifted);
    total += weight;
    if (weight != 0) weighted += weight * shifted;  // 0 log 0 = 0
  }
  *confidence = criterion == Criterion::kSoftmax ? 1 / total : weighted / total - std::log(total);
}

}  // namespace dgate_rt
