// route_ on the CPU: verdicts first, so that a refusal writes nothing; then results; then the survivors' rows, which
// are nearly all of the work, on all threads.
#include <algorithm>
#include <cstring>

#include "../graph/recording_driver.h"
#include "operators.h"

namespace dgate_rt {
namespace {

constexpr int64_t kGrain = int64_t{1} << 16;  // bytes that are worth a thread

// Copies source rows `keep` to destination rows start, start + 1, ...
void copy_rows(const Rows& rows, const std::vector<int64_t>& keep, int64_t start) {
  if (rows.bytes == 0) return;
  const int64_t bytes = rows.bytes, total = static_cast<int64_t>(keep.size()) * bytes;
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t rank = begin / bytes, offset = begin % bytes;
      const int64_t length = std::min(bytes - offset, end - begin);
      std::memcpy(rows.dest + (start + rank) * rows.dest_stride + offset,
                  rows.src + keep[static_cast<size_t>(rank)] * rows.src_stride + offset, static_cast<size_t>(length));
      begin += length;
    }
  });
}

}  // namespace

void route_on_cpu(const RouteTensors& tensors) {
  const auto [route, carried] = check_route(tensors);
  // On the CPU only the simulated driver has switches.
  const uint64_t handle = route.handle == nullptr ? 0 : static_cast<uint64_t>(*route.handle);
  const std::string why_not = handle == 0 ? "" : graph::why_not_set(handle);
  DGATE_CHECK(why_not.empty(), "handles: expected ", why_not);
  const int64_t live = live_rows(tensors.count, route.rows);
  const int64_t start = route.waiting == nullptr ? 0 : *route.waiting;
  DGATE_CHECK(0 <= start && start <= route.capacity, "waiting: expected 0 to ", route.capacity, ", got ", start);

  std::vector<int64_t> keep;
  keep.reserve(static_cast<size_t>(live));
  for (int64_t row = 0; row < live; ++row) {
    DGATE_CHECK(0 <= route.ids[row] && route.ids[row] < route.samples, "ids: expected 0 to ", route.samples - 1,
                ", got ", route.ids[row], " in row ", row);
    if (!leaves(route.margin[row], *route.threshold)) keep.push_back(row);
  }
  const int64_t survivors = static_cast<int64_t>(keep.size()), total = start + survivors;
  DGATE_CHECK(total <= route.capacity, "dest: ", start, " rows wait and ", survivors,
              " survive, more than its capacity of ", route.capacity);
  const int64_t largest = route.bucket_count ? route.buckets[route.bucket_count - 1] : total;
  DGATE_CHECK(total <= largest, "buckets: ", total, " rows go on, more than the largest bucket of ", largest, " takes");

  int64_t rank = 0;
  for (int64_t row = 0; row < live; ++row) {
    const int64_t id = route.ids[row];
    if (rank < survivors && keep[static_cast<size_t>(rank)] == row) {
      route.dest_ids[start + rank++] = id;
    } else {
      route.out_labels[id] = route.label[row];
      route.out_scores[id] = route.margin[row];
      route.out_exits[id] = route.gate;
    }
  }
  for (const Rows& rows : carried) copy_rows(rows, keep, start);
  *route.dest_count = static_cast<int32_t>(total);
  if (route.bucket != nullptr) *route.bucket = find_bucket(route, total);
  if (handle != 0) graph::set_switch(handle, static_cast<uint32_t>(find_bucket(route, total)));
}

}  // namespace dgate_rt
