// Kernels that are right, and kernels with one fault each, to see what the harness makes of them.
// Usage: toys NAME ORDER SEED; prints what the kernel wrote.
#include <cstdio>
#include <cstdlib>
#include <map>

#include "simt.h"

namespace toys {

constexpr int kThreads = 96, kBlocks = 3;
constexpr unsigned kAllLanes = ~0u;

struct Scratch {
  int value[kThreads];
  int total[kThreads / 32];
};
SIMT_SHARED(Scratch, scratch);

// The sums of the threads' numbers up to each thread, in every block.
__global__ void scan(int* out) {
  __shared__ Scratch scratch;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int sum = thread + static_cast<int>(blockIdx.x);
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += below;
  }
  if (lane == 31) scratch.total[warp] = sum;
  __syncthreads();
  for (int other = 0; other < warp; ++other) sum += scratch.total[other];
  scratch.value[thread] = sum;
  __syncthreads();
  out[blockIdx.x * kThreads + thread] = scratch.value[kThreads - 1] - scratch.value[kThreads - 1 - thread];
}

// Every operation once, in parts of warps too.
__global__ void operations(int* out) {
  const int thread = threadIdx.x, lane = thread % 32;
  if (blockIdx.x == 1) return;
  int sum = static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0) & 0xff);  // 0b01001001
  sum += __shfl_sync(kAllLanes, thread, 7) * 1000;
  if (lane < 16) {
    __syncwarp(0xffff);
    sum += __popc(__ballot_sync(0xffff, lane > 11));
  } else {
    sum += static_cast<int>(__shfl_sync(0xffff0000, int64_t{lane}, 31));
  }
  sum += __syncthreads_or(thread == 77) * 100000;
  out[blockIdx.x * kThreads + thread] = sum;
}

__global__ void missing_barrier(int* out) {
  __shared__ Scratch scratch;
  const int thread = threadIdx.x;
  scratch.value[thread] = thread;
  out[blockIdx.x * kThreads + thread] = scratch.value[kThreads - 1 - thread];
}

// The barrier before what is read is overwritten.
__global__ void missing_second_barrier(int* out) {
  __shared__ Scratch scratch;
  const int thread = threadIdx.x;
  int sum = 0;
  for (int round = 0; round < 2; ++round) {
    scratch.value[thread] = thread + round;
    __syncthreads();
    sum += scratch.value[(thread + 1) % kThreads];
  }
  out[blockIdx.x * kThreads + thread] = sum;
}

template <bool kOrdered>
__global__ void through_shared_memory_in_a_warp(int* out) {
  __shared__ Scratch scratch;
  const int thread = threadIdx.x;
  scratch.value[thread] = thread;
  kOrdered ? __syncwarp() : static_cast<void>(__ballot_sync(kAllLanes, true));
  out[blockIdx.x * kThreads + thread] = scratch.value[thread ^ 1];
}

__global__ void blocks_write_one_place(int* out) {
  if (threadIdx.x == 0) out[0] = 1;
}

__global__ void divergent_barrier(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_after_return(int*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void mask_without_the_caller(int*) { __ballot_sync(0xffff, true); }

__global__ void mask_with_a_returned_lane(int*) {
  if (threadIdx.x % 32 == 3) return;
  __ballot_sync(kAllLanes, true);
}

__global__ void mask_with_a_lane_elsewhere(int*) {
  if (threadIdx.x % 32 == 3) {
    __syncwarp(0x8);
    __shfl_sync(kAllLanes, 0, 0);
  } else {
    __ballot_sync(kAllLanes, true);
  }
}

__global__ void shuffle_from_a_lane_not_named(int*) {
  if (threadIdx.x % 32 < 16) __shfl_sync(0xffff, 0, 20);
}

__global__ void shared_memory_not_set(int* out) {
  __shared__ Scratch scratch;
  out[blockIdx.x * kThreads + threadIdx.x] = scratch.value[threadIdx.x];
  __syncthreads();
  scratch.value[threadIdx.x] = 0;
}

__global__ void shared_memory_past_its_end(int*) {
  __shared__ Scratch scratch;
  int* total = scratch.total;
  asm("" : "+r"(total));
  if (threadIdx.x == 0) total[kThreads / 32] = 1;  // past the end of shared memory
}

__global__ void row_past_its_end(int*) {
  __shared__ Scratch scratch;
  const int thread = threadIdx.x;
  scratch.value[thread + 1] = 1;  // past the end of the row
}

__global__ void global_memory_past_its_end(int* out) {
  if (threadIdx.x == 0) reinterpret_cast<char*>(out)[gridDim.x * kThreads * sizeof(int)] = 1;  // past the buffer
}

__global__ void global_memory_before_its_start(int* out) {
  if (threadIdx.x == 0) reinterpret_cast<char*>(out)[-1] = 1;  // before the start
}

__global__ void words_across(int* out) {
  if (threadIdx.x == 0) *reinterpret_cast<uint4*>(out + 1) = {};  // not aligned
}

__global__ void switch_set_twice(int*) {
  if (threadIdx.x < 2 && blockIdx.x == 0) cudaGraphSetConditional(7, 1);
}

__global__ void switch_set_once(int* out) {
  if (threadIdx.x == 2 && blockIdx.x == 1) cudaGraphSetConditional(7, 40);
  out[blockIdx.x * kThreads + threadIdx.x] = 0;
}

#define TOY(name) {#name, name}
const std::map<std::string, void (*)(int*)> kToys = {
    TOY(scan),
    TOY(operations),
    TOY(missing_barrier),
    TOY(missing_second_barrier),
    {"ordered_in_a_warp", through_shared_memory_in_a_warp<true>},
    {"unordered_in_a_warp", through_shared_memory_in_a_warp<false>},
    TOY(blocks_write_one_place),
    TOY(divergent_barrier),
    TOY(barrier_after_return),
    TOY(mask_without_the_caller),
    TOY(mask_with_a_returned_lane),
    TOY(mask_with_a_lane_elsewhere),
    TOY(shuffle_from_a_lane_not_named),
    TOY(shared_memory_not_set),
    TOY(shared_memory_past_its_end),
    TOY(row_past_its_end),
    TOY(global_memory_past_its_end),
    TOY(global_memory_before_its_start),
    TOY(words_across),
    TOY(switch_set_twice),
    TOY(switch_set_once),
};

}  // namespace toys

int main(int count, char** words) {
  if (count != 4) return 0;
  const simt::Launch launch = {toys::kBlocks, toys::kThreads, static_cast<simt::Order>(std::atoi(words[2])),
                               static_cast<uint64_t>(std::atoi(words[3]))};
  const simt::Buffer out("out", toys::kBlocks * toys::kThreads * sizeof(int));
  for (int again = 0; again < 2; ++again) {  // a launch is ordered behind the one before
    simt::run(launch, [&, kernel = toys::kToys.at(words[1])] { kernel(out.data<int>()); });
  }
  out.check();
  for (int i = 0; i < toys::kBlocks * toys::kThreads; ++i) std::printf("%d ", out.data<int>()[i]);
  std::printf("\n%d %d\n", static_cast<int>(simt::recorded.calls), static_cast<int>(simt::recorded.value));
}
