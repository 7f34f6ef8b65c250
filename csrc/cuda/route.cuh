// The route on CUDA: exit test, answers of the rows that leave, and packing of those that go on, in one launch.
//
// Every block reads all margins and keeps one bit a row in shared memory, with the number of survivors before each word
// of 32. So it knows, without hearing from another block, the rank of any row, the row of any rank, and the total: no
// atomics, no second pass, the same bits whatever the order in which blocks run. The copies of the survivors' rows are
// then dealt out in pieces of 4 KiB, a warp each.
//
// Free of torch, and of CUDA's headers but under nvcc: tests/simt compiles this file with the host's compiler.
#pragma once

#include "route_arguments.h"

namespace dgate_rt {

// Where the live rows go. Bit r % 32 of stays[r / 32]: row r goes on. before[w]: how many do in the words before w.
struct Verdicts {
  uint32_t stays[kMaxRows / 32];
  int32_t before[kMaxRows / 32];
  int32_t warp_total[32];
};

constexpr unsigned kAllLanes = 0xffffffffu;

// Fills `verdicts` for rows 0..live-1 and returns the number of survivors. All threads of the block take part.
template <int kThreads>
__device__ int find_survivors(const RouteArguments& route, int live, Verdicts& verdicts) {
  constexpr int kWarps = kThreads / 32;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int words = (live + 31) / 32;
  const float threshold = *route.threshold;
#pragma unroll 4
  for (int word = warp; word < words; word += kWarps) {
    const int row = word * 32 + lane;
    const bool stays = row < live && !leaves(route.margin[row], threshold);
    const uint32_t mask = __ballot_sync(kAllLanes, stays);
    if (lane == 0) verdicts.stays[word] = mask;
  }
  __syncthreads();

  // Each thread owns a run of words; a scan over the threads tells what lies before it.
  const int run = (words + kThreads - 1) / kThreads;
  const int first = min(thread * run, words), last = min(first + run, words);
  int own = 0;
  for (int word = first; word < last; ++word) own += __popc(verdicts.stays[word]);
  int up_to_here = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, up_to_here, distance);
    if (lane >= distance) up_to_here += below;
  }
  if (lane == 31) verdicts.warp_total[warp] = up_to_here;
  __syncthreads();

  int before = up_to_here - own, survivors = 0;
  for (int other = 0; other < kWarps; ++other) {
    if (other < warp) before += verdicts.warp_total[other];
    survivors += verdicts.warp_total[other];
  }
  for (int word = first; word < last; ++word) {
    verdicts.before[word] = before;
    before += __popc(verdicts.stays[word]);
  }
  __syncthreads();
  return survivors;
}

// The row that has `rank` survivors before it and survives itself.
__device__ inline int row_of_rank(const Verdicts& verdicts, int words, int rank) {
  int low = 0, high = words;  // the last word with at most `rank` survivors before it lies in low..high-1
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (verdicts.before[middle] <= rank ? low : high) = middle;
  }
  uint32_t bits = verdicts.stays[low];
  for (int left = rank - verdicts.before[low]; left > 0; --left) bits &= bits - 1;  // drops the lowest
  return low * 32 + __ffs(bits) - 1;
}

// Copies whole words, a warp at a time, with four of them on their way in every lane.
template <class Word>
__device__ void copy_words(const char* src, char* dest, int words, int lane) {
  constexpr int kInFlight = 4;
  const Word* from = reinterpret_cast<const Word*>(src);
  Word* to = reinterpret_cast<Word*>(dest);
#pragma unroll 1
  for (int first = lane; first < words; first += 32 * kInFlight) {
    Word values[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + 32 * i < words) values[i] = from[first + 32 * i];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + 32 * i < words) to[first + 32 * i] = values[i];
    }
  }
}

// Copies a run of bytes with one warp: 16 at a time where source and destination lie alike to a multiple of 16, else as
// many as they agree on. The bytes before and behind the whole words, 15 at most, go one to a lane.
__device__ inline void copy_run(const char* src, char* dest, int bytes, int lane) {
  const uint32_t from = static_cast<uint32_t>(reinterpret_cast<uint64_t>(src));
  const uint32_t to = static_cast<uint32_t>(reinterpret_cast<uint64_t>(dest));
  const int shift = __ffs((from ^ to) | 16) - 1, step = 1 << shift;  // 1, 2, 4, 8 or 16
  const int head = min(bytes, static_cast<int>((0 - to) & (step - 1)));
  const int words = (bytes - head) >> shift, tail = head + (words << shift);
  if (lane < head) dest[lane] = src[lane];
  if (tail + lane < bytes) dest[tail + lane] = src[tail + lane];
  switch (step) {
    case 16:
      return copy_words<uint4>(src + head, dest + head, words, lane);
    case 8:
      return copy_words<uint2>(src + head, dest + head, words, lane);
    case 4:
      return copy_words<uint32_t>(src + head, dest + head, words, lane);
    case 2:
      return copy_words<uint16_t>(src + head, dest + head, words, lane);
    default:
      return copy_words<uint8_t>(src + head, dest + head, words, lane);
  }
}

// Copies the survivors' rows of every tensor. Neighbouring pieces go to different blocks, so that few large rows are
// spread over the device as well as many small ones.
template <int kThreads>
__device__ void carry_rows(const RouteArguments& route, const Verdicts& verdicts, int words, int survivors,
                           int waiting) {
  constexpr int kWarps = kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warps = static_cast<int>(gridDim.x) * kWarps;
  int item = warp * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
#pragma unroll 1
  for (int tensor = 0; tensor < route.tensors; ++tensor) {
    const Rows& rows = route.carried[tensor];
    const int pieces = static_cast<int>((rows.bytes + kPiece - 1) / kPiece), items = survivors * pieces;
#pragma unroll 1
    for (; item < items; item += warps) {
      const int rank = item / pieces;
      const int64_t offset = static_cast<int64_t>(item - rank * pieces) * kPiece;
      const char* src = rows.src + row_of_rank(verdicts, words, rank) * rows.src_stride + offset;
      char* dest = rows.dest + (static_cast<int64_t>(waiting) + rank) * rows.dest_stride + offset;
      copy_run(src, dest, static_cast<int>(min(static_cast<int64_t>(kPiece), rows.bytes - offset)), lane);
    }
    item -= items;
  }
}

// Writes the answers of the rows that leave to their sample's place, and hands on the ids of the others.
template <int kThreads>
__device__ void answer(const RouteArguments& route, const Verdicts& verdicts, int live, int waiting) {
  const int threads = static_cast<int>(gridDim.x) * kThreads;
#pragma unroll 1
  for (int row = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x); row < live; row += threads) {
    const int64_t id = route.ids[row];
    const uint32_t word = verdicts.stays[row / 32], bit = 1u << row % 32;
    if (word & bit) {
      route.dest_ids[static_cast<int64_t>(waiting) + verdicts.before[row / 32] + __popc(word & (bit - 1))] = id;
    } else if (0 <= id && id < route.samples) {
      route.out_labels[id] = route.label[row];
      route.out_scores[id] = route.margin[row];
      route.out_exits[id] = route.gate;
    }
  }
}

// Whether some live row has an id that is no index of the outputs. All threads of the block take part.
template <int kThreads>
__device__ bool finds_bad_id(const RouteArguments& route, int live) {
  bool bad = false;
  for (int row = threadIdx.x; row < live; row += kThreads) {
    const int64_t id = route.ids[row];
    bad |= id < 0 || id >= route.samples;
  }
  return __syncthreads_or(bad);
}

// Launch: any number of blocks of kThreads, at least one, even for no rows.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 768 / kThreads) route_kernel(const __grid_constant__ RouteArguments route) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps, and at most 32 of them");
  __shared__ Verdicts verdicts;
  const bool speaks = blockIdx.x == 0 && threadIdx.x == 0;  // the one thread that writes counters

  const int64_t live = route.count == nullptr ? route.rows : *route.count;
  const int64_t waiting = route.waiting == nullptr ? 0 : *route.waiting;
  int32_t error =
      (live < 0 || live > route.rows ? kBadCount : 0) | (waiting < 0 || waiting > route.capacity ? kBadWaiting : 0);
  int survivors = 0;
  if (error == 0) {  // alike for all threads
    survivors = find_survivors<kThreads>(route, static_cast<int>(live), verdicts);
    const int64_t total = waiting + survivors;
    if (total > route.capacity) error = kOverflow;
    if (route.bucket_count > 0 && total > route.buckets[route.bucket_count - 1]) error |= kNoBucket;
  }
  if (error != 0) {
    if (speaks && route.status != nullptr) *route.status |= error;
    return;
  }

  const int total = static_cast<int>(waiting) + survivors, words = static_cast<int>((live + 31) / 32);
  answer<kThreads>(route, verdicts, static_cast<int>(live), static_cast<int>(waiting));
  carry_rows<kThreads>(route, verdicts, words, survivors, static_cast<int>(waiting));
  if (blockIdx.x != 0) return;

  const bool bad_id = finds_bad_id<kThreads>(route, static_cast<int>(live));
  if (!speaks) return;
  *route.dest_count = total;
  if (bad_id && route.status != nullptr) *route.status |= kBadId;
  if (route.bucket_count > 0) {
    const int bucket = find_bucket(route, total);
    if (route.bucket != nullptr) *route.bucket = bucket;
    if (route.handle != nullptr && *route.handle != 0) {
      cudaGraphSetConditional(static_cast<cudaGraphConditionalHandle>(*route.handle), static_cast<unsigned>(bucket));
    }
  }
}

}  // namespace dgate_rt
