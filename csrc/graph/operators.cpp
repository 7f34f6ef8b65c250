// The operators over graphs; their schemas are in dgate_rt/ops.py. Objects cross to Python as numbers.
#include <map>
#include <memory>
#include <mutex>
#include <numeric>

#include "../common.h"
#include "assemble.h"
#include "recording_driver.h"

namespace dgate_rt::graph {
namespace {

template <class Pointer>
Pointer as(int64_t number) {
  return reinterpret_cast<Pointer>(number);
}

struct Registry {
  std::mutex mutex;
  int64_t last_id = 0;
  std::map<int64_t, std::shared_ptr<AssembledGraph>> graphs;
};

Registry& registry() {
  static Registry* const kept = new Registry;  // never ended: at exit the driver may be gone before statics are
  return *kept;
}

std::shared_ptr<AssembledGraph> find(int64_t graph, bool remove = false) {
  const std::lock_guard lock(registry().mutex);
  const auto found = registry().graphs.find(graph);
  DGATE_CHECK(found != registry().graphs.end(), "graph: expected one that was assembled and not destroyed, got ",
              graph);
  const std::shared_ptr<AssembledGraph> held = found->second;
  if (remove) registry().graphs.erase(found);
  return held;
}

int64_t recording_graph_driver() { return reinterpret_cast<int64_t>(&recording_driver()); }

// The graph's number, then the switch of each later segment. `names` has one a segment, `buckets` says how many of the
// captures each later one has, and `sizes` of how many samples those are.
std::vector<int64_t> assemble(int64_t driver, int64_t stream, std::vector<int64_t> captures,
                              std::vector<std::string> names, std::vector<int64_t> buckets,
                              std::vector<int64_t> sizes) {
  DGATE_CHECK(driver != 0, "driver: expected the address of a table, got 0");
  const Driver& table = *as<const Driver*>(driver);
  DGATE_CHECK(table.layout == kLayout, "driver: expected a table of layout ", kLayout, ", got ", table.layout,
              "; build both halves of the extension from the same sources");
  DGATE_CHECK(names.size() == 1 + buckets.size(), "names: expected ", 1 + buckets.size(), ", got ", names.size());
  for (size_t i = 0; i < buckets.size(); ++i)
    DGATE_CHECK(buckets[i] > 0, "buckets: ", names[i + 1], ": expected at least one, got ", buckets[i]);
  const size_t expected = std::accumulate(buckets.begin(), buckets.end(), size_t{0});
  DGATE_CHECK(sizes.size() == expected, "sizes: expected ", expected, ", got ", sizes.size());
  DGATE_CHECK(captures.size() == 1 + expected, "captures: expected ", 1 + expected, ", got ", captures.size());

  size_t next = 0;
  const auto take = [&](const std::string& name, int64_t bucket) {
    DGATE_CHECK(captures[next] != 0, "captures: ", name, ": expected a graph, got 0");
    return Capture{as<Graph>(captures[next++]), bucket, name};
  };
  const Capture first = take(names[0], 0);
  std::vector<Segment> later;
  for (size_t i = 0; i < buckets.size(); ++i) {
    later.push_back({names[i + 1], {}});
    while (later[i].buckets.size() < static_cast<size_t>(buckets[i])) {
      const int64_t size = sizes[next - 1];
      later[i].buckets.push_back(take(names[i + 1] + ", bucket " + std::to_string(size), size));
    }
  }
  const auto graph = std::make_shared<AssembledGraph>(table, as<Stream>(stream), first, later);
  const std::lock_guard lock(registry().mutex);
  std::vector<int64_t> made{++registry().last_id};
  registry().graphs[made[0]] = graph;
  for (const Switch handle : graph->switches()) made.push_back(static_cast<int64_t>(handle));
  return made;
}

void launch(int64_t graph, int64_t stream) { find(graph)->launch(as<Stream>(stream)); }
void destroy(int64_t graph) { find(graph, true)->destroy(); }
std::string describe(int64_t graph, std::string format) { return find(graph)->describe(format); }

int64_t sim_capture(int64_t callback, std::string nodes) {
  DGATE_CHECK(callback != 0, "callback: expected the address of a function, got 0");
  return reinterpret_cast<int64_t>(simulate_capture(as<int (*)()>(callback), nodes));
}

void sim_release(int64_t capture) { release_capture(as<Graph>(capture)); }

std::vector<int64_t> sim_counts() {
  const Counts now = counts();
  return {now.launches,         now.stages,      now.conditionals, now.host_calls,
          now.synchronisations, now.allocations, now.live,         now.live_captures};
}

void sim_reset() {
  reset_counts();
  set_version(13000);
  fail_after(-1);
}

}  // namespace
}  // namespace dgate_rt::graph

STABLE_TORCH_LIBRARY_IMPL(dgate_rt, CompositeExplicitAutograd, library) {
  library.impl("recording_graph_driver", TORCH_BOX(&dgate_rt::graph::recording_graph_driver));
  library.impl("graph_assemble", TORCH_BOX(&dgate_rt::graph::assemble));
  library.impl("graph_launch", TORCH_BOX(&dgate_rt::graph::launch));
  library.impl("graph_destroy", TORCH_BOX(&dgate_rt::graph::destroy));
  library.impl("graph_describe", TORCH_BOX(&dgate_rt::graph::describe));
  library.impl("sim_capture", TORCH_BOX(&dgate_rt::graph::sim_capture));
  library.impl("sim_release", TORCH_BOX(&dgate_rt::graph::sim_release));
  library.impl("sim_counts", TORCH_BOX(&dgate_rt::graph::sim_counts));
  library.impl("sim_reset", TORCH_BOX(&dgate_rt::graph::sim_reset));
  library.impl("sim_call", TORCH_BOX(&dgate_rt::graph::sim_call));
}
