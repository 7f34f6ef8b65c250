// Memory that shows what a kernel does next to it, and the end on an error.
#include <unistd.h>

#include <cstdarg>
#include <cstddef>
#include <cstdio>

#include "simt.h"

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace simt {
namespace {

constexpr unsigned char kFence = 0xa5;
#if defined(SIMT_ASAN)
constexpr size_t kAround = 0;  // its own red zones start right there
#else
constexpr size_t kAround = 64;
#endif

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("simt: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputs("\n", stderr);
  va_end(arguments);
  std::fflush(stderr);
  _exit(3);
}

void fill(void* address, unsigned char value, size_t size) {
  asm volatile("rep stosb" : "+D"(address), "+c"(size) : "a"(value) : "memory");
}

Buffer::Buffer(std::string name, size_t size, size_t offset)
    : name_(std::move(name)), size_(size), offset_(kAround + offset), memory_(new char[offset_ + size + kAround]) {
  fill(memory_.get(), kFence, offset_);
  fill(data(), 0xff, size);
  fill(data() + size, kFence, kAround);
#if defined(SIMT_ASAN)
  ASAN_POISON_MEMORY_REGION(memory_.get(), offset);  // whole words of 8 bytes; check() sees writes to the others
#endif
}

Buffer::~Buffer() {
#if defined(SIMT_ASAN)
  if (memory_) ASAN_UNPOISON_MEMORY_REGION(memory_.get(), offset_);
#endif
}

void Buffer::check() const {
  const auto* start = reinterpret_cast<const unsigned char*>(memory_.get());
  for (size_t i = 0; i < offset_ + size_ + kAround; ++i) {
    if ((i < offset_ || i >= offset_ + size_) && start[i] != kFence) {
      fail("%s of %zu bytes: byte %td was written", name_.c_str(), size_, static_cast<ptrdiff_t>(i - offset_));
    }
  }
}

}  // namespace simt
