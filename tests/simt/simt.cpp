// Threads as fibers, and where they meet. Compiled without sanitizers, so that only the kernel's accesses are seen.
#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <queue>
#include <vector>

#if !defined(__x86_64__)
#error "the switch from stack to stack is written for x86-64"
#endif

#if defined(SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_java_init(unsigned long heap, unsigned long size);
void __tsan_java_alloc(unsigned long address, unsigned long size);
void __tsan_java_free(unsigned long address, unsigned long size);
}
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
simt::Switch simt::recorded;

// Pushes what a function must keep, leaves its stack in *from, and goes on where `to` left off.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace simt {
namespace {

constexpr size_t kStack = 256 << 10;  // a sanitizer writes its report on the stack of the fiber
constexpr size_t kGuard = 4096;

struct Context {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;    // AddressSanitizer's
  void* race_context = nullptr;  // ThreadSanitizer's
};

enum class State { kReady, kWaiting, kReturned };

struct Fiber : Context {
  int thread;
  State state;
  // Where it waits, and with what.
  Meeting meeting;
  unsigned mask, operand;
  const char* file;
  int line;
  uint64_t value, result;
};

struct Turn {
  uint64_t rank;
  Fiber* fiber;
  bool operator<(const Turn& other) const { return rank > other.rank; }  // the lowest rank is the first out
};

struct Block {
  std::vector<Fiber> fibers;
  std::priority_queue<Turn> ready;
  int at_barrier = 0, returned = 0;
};

std::vector<char*> stacks;
const Shared* shared = nullptr;
const Launch* launch;
void (*body)(const void*);
const void* argument;
Block* block;
Fiber* running;
Context scheduler;
uint64_t random_state;
[[maybe_unused]] char* end_of_launch;  // what ThreadSanitizer orders the threads before the host's next step by

uint64_t draw() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

void landed(Context& context) {
#if defined(SIMT_ASAN)
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(context.fake_stack, &stack, &size);
  if (&context != &scheduler) scheduler.stack = stack, scheduler.stack_size = size;
#else
  (void)context;
#endif
}

void switch_to(Context& from, Context& to, bool for_good = false) {
  (void)for_good;
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#endif
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(to.race_context, __tsan_switch_to_fiber_no_sync);
#endif
  simt_switch(&from.stack_pointer, to.stack_pointer);
  landed(from);
}

void enter() {
  landed(*running);
  body(argument);
  running->state = State::kReturned;
  ++block->returned;
#if defined(SIMT_TSAN)
  __tsan_release(end_of_launch);
#endif
  switch_to(*running, scheduler, true);
  __builtin_unreachable();
}

void make_ready(Fiber& fiber) {
  const uint64_t thread = static_cast<uint64_t>(fiber.thread);
  const uint64_t rank = launch->order == Order::kRandom ? draw() : launch->order == Order::kForward ? thread : ~thread;
  fiber.state = State::kReady;
  block->ready.push({rank, &fiber});
}

const char* name_of(Meeting meeting) {
  constexpr const char* kNames[] = {"__syncthreads", "__syncthreads_or", "__syncwarp",
                                    "__ballot_sync", "__shfl_up_sync",   "__shfl_sync"};
  return kNames[static_cast<int>(meeting)];
}

bool at_barrier(const Fiber& fiber) { return fiber.meeting <= Meeting::kSyncthreadsOr; }

bool at_one_place(const Fiber& a, const Fiber& b) {
  if (a.state != b.state || a.state != State::kWaiting) return a.state == b.state;
  return a.meeting == b.meeting && a.mask == b.mask && a.line == b.line && !std::strcmp(a.file, b.file);
}

std::string describe(const Fiber& fiber) {
  if (fiber.state == State::kReturned) return "returned";
  if (fiber.state == State::kReady) return "could go on";
  char text[64] = "";
  if (!at_barrier(fiber)) std::snprintf(text, sizeof text, "(0x%08x)", fiber.mask);
  return std::string("at ") + name_of(fiber.meeting) + text + ", " + fiber.file + ":" + std::to_string(fiber.line);
}

// Ends the process with `what` and where every thread of the block is.
[[noreturn]] void fail_with_threads(const char* what) {
  std::string where;
  const std::vector<Fiber>& fibers = block->fibers;
  for (size_t first = 0, next; first < fibers.size(); first = next) {
    for (next = first + 1; next < fibers.size() && at_one_place(fibers[first], fibers[next]);) ++next;
    where +=
        "\n  threads " + std::to_string(first) + " to " + std::to_string(next - 1) + ": " + describe(fibers[first]);
  }
  fail("%s (block %u)%s", what, blockIdx.x, where.c_str());
}

// No thread can go on, and not all have returned.
[[noreturn]] void explain_standstill() {
  const Fiber* barrier = nullptr;
  for (const Fiber& fiber : block->fibers) {
    if (fiber.state != State::kWaiting) continue;
    if (at_barrier(fiber)) {
      if (block->returned > 0) fail_with_threads("barrier after a return: threads of the block wait, others returned");
      if (barrier && !at_one_place(*barrier, fiber))
        fail_with_threads("divergent barrier: threads wait at different ones");
      barrier = &fiber;
      continue;
    }
    for (unsigned left = fiber.mask; left != 0; left &= left - 1) {
      const size_t other = fiber.thread / 32 * 32 + __builtin_ctz(left);
      if (other >= block->fibers.size()) fail_with_threads("wrong mask: it names a lane that is not there");
      if (block->fibers[other].state == State::kReturned)
        fail_with_threads("wrong mask: it names a lane that returned");
      if (!at_one_place(fiber, block->fibers[other]))
        fail_with_threads("wrong mask: it names a lane that waits elsewhere");
    }
  }
  fail_with_threads("deadlock");
}

// Orders all that `members` did before all that they will do.
void order_memory(const std::vector<Fiber*>& members) {
#if defined(SIMT_TSAN)
  char* token = new char;  // a new one, lest it hold what others released
  for (Fiber* member : members) {
    __tsan_switch_to_fiber(member->race_context, __tsan_switch_to_fiber_no_sync);
    __tsan_release(token);
  }
  for (Fiber* member : members) {
    __tsan_switch_to_fiber(member->race_context, __tsan_switch_to_fiber_no_sync);
    __tsan_acquire(token);
  }
  __tsan_switch_to_fiber(running->race_context, __tsan_switch_to_fiber_no_sync);
  delete token;
#else
  (void)members;
#endif
}

// Gives every member its result and lets it go on. `members` are in the order of their threads.
void complete(const std::vector<Fiber*>& members) {
  const Meeting meeting = running->meeting;
  if (meeting <= Meeting::kSyncwarp) order_memory(members);
  uint64_t any = 0, ballot = 0;
  Fiber* of_lane[32] = {};
  for (Fiber* member : members) {
    any |= member->value;
    ballot |= member->value << member->thread % 32;
    of_lane[member->thread % 32] = member;
  }
  for (Fiber* member : members) {
    const int lane = member->thread % 32;
    if (meeting == Meeting::kSyncthreadsOr) member->result = any;
    if (meeting == Meeting::kBallot) member->result = ballot;
    if (meeting == Meeting::kShflUp || meeting == Meeting::kShfl) {
      const int operand = static_cast<int>(member->operand);
      const int from = meeting == Meeting::kShfl ? operand : lane >= operand ? lane - operand : lane;
      if (!of_lane[from]) fail_with_threads("wrong mask: a shuffle reads from a lane that it does not name");
      member->result = of_lane[from]->value;
    }
    make_ready(*member);
  }
}

void arrive_at_barrier() {
  if (++block->at_barrier < static_cast<int>(block->fibers.size())) return;
  std::vector<Fiber*> members;
  for (Fiber& fiber : block->fibers) {
    if (!at_one_place(fiber, *running)) explain_standstill();
    members.push_back(&fiber);
  }
  block->at_barrier = 0;
  complete(members);
}

void arrive_in_warp() {
  if (!(running->mask >> running->thread % 32 & 1)) fail_with_threads("wrong mask: the calling lane is not in it");
  std::vector<Fiber*> members;
  for (unsigned left = running->mask; left != 0; left &= left - 1) {
    const size_t thread = running->thread / 32 * 32 + __builtin_ctz(left);
    if (thread >= block->fibers.size() || !at_one_place(block->fibers[thread], *running)) return;
    members.push_back(&block->fibers[thread]);
  }
  complete(members);
}

void prepare(Fiber& fiber, int thread, char* stack, void* race_context) {
  fiber = {};
  fiber.thread = thread;
  fiber.stack = stack;
  fiber.stack_size = kStack;
  fiber.race_context = race_context;
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // a return address for enter(), which has none
  *--top = reinterpret_cast<void*>(enter);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
  make_ready(fiber);
}

void run_block(int index, char* const* stacks_of_block, void* const* race_contexts) {
  for (const Shared* memory = shared; memory; memory = memory->next) {
    fill(memory->address, 0xff, memory->size);
#if defined(SIMT_TSAN)  // new memory for every block: what the block before did there is no race
    const auto address = reinterpret_cast<unsigned long>(memory->address), size = (memory->size + 7) / 8 * 8;
    __tsan_java_alloc(address, size);
#endif
  }
  Block here;
  block = &here;
  blockIdx = {static_cast<unsigned>(index), 0, 0};
  here.fibers.resize(launch->threads);
  for (int thread = 0; thread < launch->threads; ++thread) {
    prepare(here.fibers[thread], thread, stacks_of_block[thread], race_contexts ? race_contexts[thread] : nullptr);
  }
  while (!here.ready.empty()) {
    running = here.ready.top().fiber;
    here.ready.pop();
    threadIdx = {static_cast<unsigned>(running->thread), 0, 0};
    switch_to(scheduler, *running);
  }
  if (here.returned < launch->threads) explain_standstill();
#if defined(SIMT_TSAN)
  for (const Shared* memory = shared; memory; memory = memory->next) {
    __tsan_java_free(reinterpret_cast<unsigned long>(memory->address), (memory->size + 7) / 8 * 8);
  }
#endif
}

#if defined(SIMT_TSAN)
// ThreadSanitizer forgets what was done to memory where a language runtime says that it allocates it anew; this says
// that all shared memory is such a runtime's.
void announce_shared_memory() {
  unsigned long low = ~0ul, high = 0;
  for (const Shared* memory = shared; memory; memory = memory->next) {
    const auto address = reinterpret_cast<unsigned long>(memory->address);
    low = std::min(low, address);
    high = std::max(high, address + memory->size);
  }
  if (high > 0) __tsan_java_init(low, (high - low + 7) / 8 * 8);
}
#endif

char* new_stack() {
  void* pages =
      mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED || mprotect(pages, kGuard, PROT_NONE) != 0) fail("no memory for the stack of a thread");
  return static_cast<char*>(pages) + kGuard;
}

}  // namespace

Shared::Shared(void* at, size_t bytes) : address(at), size(bytes), next(shared) { shared = this; }

uint64_t meet(Meeting meeting, unsigned mask, uint64_t value, unsigned operand, const char* file, int line) {
  Fiber& self = *running;
  self.state = State::kWaiting;
  self.meeting = meeting;
  self.mask = mask;
  self.value = value;
  self.operand = operand;
  self.file = file;
  self.line = line;
  at_barrier(self) ? arrive_at_barrier() : arrive_in_warp();
  switch_to(self, scheduler);
  return self.result;
}

void run(const Launch& how, void (*kernel)(const void*), const void* arguments) {
  launch = &how;
  body = kernel;
  argument = arguments;
  random_state = how.seed;
  recorded = {};
  gridDim = {static_cast<unsigned>(how.blocks), 1, 1};
  blockDim = {static_cast<unsigned>(how.threads), 1, 1};
  std::vector<int> blocks(how.blocks);
  for (int i = 0; i < how.blocks; ++i) blocks[i] = how.order == Order::kBackward ? how.blocks - 1 - i : i;
  if (how.order == Order::kRandom) {
    for (int i = how.blocks - 1; i > 0; --i) std::swap(blocks[i], blocks[draw() % (i + 1)]);
  }
  size_t fibers = how.threads;
#if defined(SIMT_TSAN)  // nothing orders a block after another: no stack and no clock is used by two
  fibers *= how.blocks;
  scheduler.race_context = __tsan_get_current_fiber();
  std::vector<void*> race_contexts(fibers);
  for (void*& context : race_contexts) context = __tsan_create_fiber(0);
  static const bool once = (announce_shared_memory(), true);
  (void)once;
  end_of_launch = new char;
#endif
  while (stacks.size() < fibers) stacks.push_back(new_stack());
  for (int i = 0; i < how.blocks; ++i) {
#if defined(SIMT_TSAN)
    run_block(blocks[i], &stacks[i * how.threads], &race_contexts[i * how.threads]);
#else
    run_block(blocks[i], stacks.data(), nullptr);
#endif
  }
#if defined(SIMT_TSAN)
  __tsan_acquire(end_of_launch);
  delete end_of_launch;
  for (void* context : race_contexts) __tsan_destroy_fiber(context);
#endif
}

}  // namespace simt

void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value, const char* file, int line) {
  if (simt::recorded.calls++ > 0) {
    simt::fail("cudaGraphSetConditional: called twice in a launch, now by thread %u of block %u, %s:%d", threadIdx.x,
               blockIdx.x, file, line);
  }
  simt::recorded.handle = handle;
  simt::recorded.value = value;
}
