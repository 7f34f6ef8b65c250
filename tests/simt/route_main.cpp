// Runs the route kernel on cases from stdin: integers of 8 bytes and buffers, in the order in which they are read here.
// Answers with the switch's value and all buffers as they are afterwards.
#include "simt.h"
// Above the kernel.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/route.cuh"

namespace dgate_rt {
SIMT_SHARED(Verdicts, verdicts);
}

namespace {

using dgate_rt::RouteArguments;

bool read(void* data, size_t size) { return size == 0 || std::fread(data, size, 1, stdin) == 1; }

void write(const void* data, size_t size) {
  if (size != 0 && std::fwrite(data, size, 1, stdout) != 1) std::exit(2);
}

int64_t read_integer() {
  int64_t value;
  if (!read(&value, sizeof value)) std::exit(0);  // no more cases
  return value;
}

using Buffers = std::vector<simt::Buffer>;

// A size (negative: no such buffer), an offset from a multiple of 16, and the bytes.
template <class T>
T* read_buffer(Buffers& buffers, const char* name) {
  const int64_t size = read_integer(), offset = read_integer();
  if (size < 0) return nullptr;
  buffers.emplace_back(name, static_cast<size_t>(size), static_cast<size_t>(offset));
  if (!read(buffers.back().data(), buffers.back().size())) std::exit(2);
  return buffers.back().data<T>();
}

// A stride, and a buffer.
template <class T>
dgate_rt::Vector<T> read_vector(Buffers& buffers, const char* name) {
  const int64_t stride = read_integer();
  return {read_buffer<T>(buffers, name), stride};
}

RouteArguments read_arguments(Buffers& buffers) {
  RouteArguments route = {};
  route.rows = read_integer();
  route.gate = read_integer();
  route.capacity = read_integer();
  route.samples = read_integer();
  route.bucket_count = read_integer();
  route.tensors = static_cast<int32_t>(read_integer());
  route.ids = read_vector<const int64_t>(buffers, "ids");
  route.margin = read_vector<const float>(buffers, "margin");
  route.label = read_vector<const int64_t>(buffers, "label");
  route.dest_ids = read_vector<int64_t>(buffers, "dest_ids");
  route.out_labels = read_vector<int64_t>(buffers, "out_labels");
  route.out_scores = read_vector<float>(buffers, "out_scores");
  route.out_exits = read_vector<int64_t>(buffers, "out_exits");
  route.buckets = read_vector<const int32_t>(buffers, "buckets");
  route.count = read_buffer<const int32_t>(buffers, "count");
  route.threshold = read_buffer<const float>(buffers, "threshold");
  route.dest_count = read_buffer<int32_t>(buffers, "dest_count");
  route.waiting = read_buffer<const int32_t>(buffers, "waiting");
  route.bucket = read_buffer<int32_t>(buffers, "bucket");
  route.handle = read_buffer<const int64_t>(buffers, "handle");
  route.status = read_buffer<int32_t>(buffers, "status");
  for (int i = 0; i < route.tensors; ++i) {
    dgate_rt::Rows& rows = route.carried[i];
    rows.bytes = read_integer();
    rows.src_stride = read_integer();
    rows.dest_stride = read_integer();
    rows.src = read_buffer<const char>(buffers, "src");
    rows.dest = read_buffer<char>(buffers, "dest");
  }
  return route;
}

}  // namespace

int main() {
  for (;;) {
    simt::Launch launch;
    launch.threads = static_cast<int>(read_integer());
    launch.blocks = static_cast<int>(read_integer());
    launch.order = static_cast<simt::Order>(read_integer());
    launch.seed = static_cast<uint64_t>(read_integer());
    Buffers buffers;
    const RouteArguments route = read_arguments(buffers);
    if (launch.threads == 64) {
      simt::run(launch, [&] { dgate_rt::route_kernel<64>(route); });
    } else if (launch.threads == dgate_rt::kRouteThreads) {
      simt::run(launch, [&] { dgate_rt::route_kernel<dgate_rt::kRouteThreads>(route); });
    } else {
      simt::fail("%d threads: expected 64 or %d", launch.threads, dgate_rt::kRouteThreads);
    }
    const int64_t told[] = {simt::recorded.calls, static_cast<int64_t>(simt::recorded.handle), simt::recorded.value};
    write(told, sizeof told);
    for (const simt::Buffer& buffer : buffers) {
      buffer.check();
      write(buffer.data(), buffer.size());
    }
    std::fflush(stdout);
  }
}
