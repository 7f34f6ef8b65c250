// What a kernel needs of CUDA, for the host's compiler: README.md says how it runs and what it catches.
//
// Include this before the kernel. Shared memory is declared by the kernel and defined by whoever includes it, in the
// kernel's namespace: SIMT_SHARED(Type, name).
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ extern
#define SIMT_SHARED(Type, name) \
  alignas(16) Type name;        \
  static const simt::Shared simt_shared_##name(&name, sizeof(name))

// The place in the source where a function is called.
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using cudaGraphConditionalHandle = unsigned long long;
void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value, SIMT_SITE);

namespace simt {

enum class Order { kForward, kBackward, kRandom };

struct Launch {
  int blocks, threads;
  Order order = Order::kForward;  // of the blocks, and of a block's threads that could go on
  uint64_t seed = 0;
};

// Runs `body`, which calls the kernel, as every thread of every block. An error ends the process.
void run(const Launch& launch, void (*body)(const void*), const void* argument);

template <class Body>
void run(const Launch& launch, const Body& body) {
  run(launch, [](const void* argument) { (*static_cast<const Body*>(argument))(); }, &body);
}

// What the last launch told a conditional node, if it did.
struct Switch {
  int64_t calls;
  cudaGraphConditionalHandle handle;
  unsigned value;
};
extern Switch recorded;

// Registers shared memory, to be poisoned before every block.
struct Shared {
  Shared(void* address, size_t size);
  void* address;
  size_t size;
  const Shared* next;
};

// Device memory of exactly `size` bytes that starts `offset` bytes behind a multiple of 16.
class Buffer {
 public:
  Buffer(std::string name, size_t size, size_t offset = 0);
  ~Buffer();
  Buffer(Buffer&& other) = default;
  template <class T = char>
  T* data() const {
    return reinterpret_cast<T*>(memory_.get() + offset_);
  }
  size_t size() const { return size_; }
  // Ends the process if a byte next to the buffer was written.
  void check() const;

 private:
  std::string name_;
  size_t size_, offset_;
  std::unique_ptr<char[]> memory_;
};

// A memset that no sanitizer intercepts.
void fill(void* address, unsigned char value, size_t size);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// What threads meet at. Of the warp's, only __syncwarp orders memory: "these intrinsics do not imply a memory barrier".
enum class Meeting { kSyncthreads, kSyncthreadsOr, kSyncwarp, kBallot, kShflUp, kShfl };
uint64_t meet(Meeting meeting, unsigned mask, uint64_t value, unsigned operand, const char* file, int line);

template <class T>
T shuffle(Meeting meeting, unsigned mask, T value, unsigned operand, const char* file, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "as CUDA's shuffles");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet(meeting, mask, bits, operand, file, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

inline void __syncthreads(SIMT_SITE) { simt::meet(simt::Meeting::kSyncthreads, ~0u, 0, 0, file, line); }
inline int __syncthreads_or(int predicate, SIMT_SITE) {
  return static_cast<int>(simt::meet(simt::Meeting::kSyncthreadsOr, ~0u, predicate != 0, 0, file, line));
}
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) { simt::meet(simt::Meeting::kSyncwarp, mask, 0, 0, file, line); }
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  return static_cast<unsigned>(simt::meet(simt::Meeting::kBallot, mask, predicate != 0, 0, file, line));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, SIMT_SITE) {
  return simt::shuffle(simt::Meeting::kShflUp, mask, value, delta, file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, SIMT_SITE) {
  return simt::shuffle(simt::Meeting::kShfl, mask, value, static_cast<unsigned>(lane) % 32, file, line);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// As CUDA has them: an int with an unsigned is an unsigned; an int with a long is ambiguous.
#define SIMT_MIN_MAX(T, A, B)                                                                                      \
  inline T min(A a, B b) { return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b); } \
  inline T max(A a, B b) { return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b); }
#define SIMT_INTEGER_MIN_MAX(T)                    \
  SIMT_MIN_MAX(T, T, T)                            \
  SIMT_MIN_MAX(unsigned T, unsigned T, unsigned T) \
  SIMT_MIN_MAX(unsigned T, unsigned T, T)          \
  SIMT_MIN_MAX(unsigned T, T, unsigned T)
SIMT_INTEGER_MIN_MAX(int)
SIMT_INTEGER_MIN_MAX(long)
SIMT_INTEGER_MIN_MAX(long long)
SIMT_MIN_MAX(float, float, float)
SIMT_MIN_MAX(double, double, double)
