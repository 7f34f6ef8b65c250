// What the route means, for CPU and CUDA alike, and how it sees memory. Free of torch, so that every compiler takes it.
#pragma once

#include <cfloat>
#include <cstdint>

#if defined(__CUDACC__)
#define DGATE_HOST_DEVICE __host__ __device__
#else
#define DGATE_HOST_DEVICE
#endif

namespace dgate_rt {

// The exit rule (Algorithm 1, line 4): a sample leaves where its margin reaches the threshold, if the margin is finite.
// NaN fails every comparison.
DGATE_HOST_DEVICE inline bool leaves(float margin, float threshold) {
  return margin >= threshold && margin >= -FLT_MAX && margin <= FLT_MAX;
}

// A 1-D tensor at any stride.
template <class T>
struct Vector {
  T* data;
  int64_t stride;
  DGATE_HOST_DEVICE T& operator[](int64_t index) const { return data[index * stride]; }
};

// One tensor that crosses the cut: a row is one run of memory, in source and destination alike. All in bytes.
struct Rows {
  const char* src;
  char* dest;
  int64_t src_stride, dest_stride;  // from row to row
  int64_t bytes;                    // of a row
};

// The arguments of route_ but for the tensors that cross the cut; dgate_rt/ops.py says what each means.
struct Route {
  int64_t rows;
  Vector<const int64_t> ids;
  Vector<const float> margin;
  Vector<const int64_t> label;
  const int32_t* count;  // rows that are live; null: all
  const float* threshold;
  int64_t gate;

  int64_t capacity;
  Vector<int64_t> dest_ids;
  int32_t* dest_count;
  const int32_t* waiting;  // rows that wait in dest already; null: none

  int64_t samples;
  Vector<int64_t> out_labels;
  Vector<float> out_scores;
  Vector<int64_t> out_exits;

  int64_t bucket_count;           // 0: no bucket is chosen
  Vector<const int32_t> buckets;  // sizes, ascending
  int32_t* bucket;                // where its index goes; null: nowhere
  const int64_t* handle;          // of the switch that shall get the index too; null, or 0 there: none

  int32_t* status;  // RouteError bits are added to it; null: nobody asks
};

// The index of the smallest bucket that holds `total` rows; bucket_count where no row, or too many, are to run.
DGATE_HOST_DEVICE inline int find_bucket(const Route& route, int64_t total) {
  const int buckets = static_cast<int>(route.bucket_count);
  if (total == 0) return buckets;
  int bucket = 0;
  while (bucket < buckets && route.buckets[bucket] < total) ++bucket;
  return bucket;
}

}  // namespace dgate_rt
