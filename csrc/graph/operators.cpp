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

// The graph's number, then the switch of each later stage. `buckets` says how many of the captures each of those has.
std::vector<int64_t> assemble(int64_t driver, int64_t stream, std::vector<int64_t> captures,
                              std::vector<int64_t> buckets, std::vector<std::string> names) {
  DGATE_CHECK(driver != 0, "driver: expected the address of a table, got 0");
  const Driver& table = *as<const Driver*>(driver);
  DGATE_CHECK(table.layout == kLayout, "driver: expected a table of layout ", kLayout, ", got ", table.layout,
              "; build both halves of the extension from the same sources");
  for (const int64_t count : buckets) DGATE_CHECK(count > 0, "buckets: expected at least one a stage, got ", count);
  const size_t expected = std::accumulate(buckets.begin(), buckets.end(), size_t{1});
  DGATE_CHECK(captures.size() == expected, "captures: expected ", expected, ", got ", captures.size());
  DGATE_CHECK(names.size() == expected, "names: expected ", expected, ", got ", names.size());

  size_t next = 0;
  const auto take = [&] {
    DGATE_CHECK(captures[next] != 0, "captures: ", names[next], ": expected a graph, got 0");
    const Capture capture{as<Graph>(captures[next]), names[next]};
    ++next;
    return capture;
  };
  const Capture first = take();
  std::vector<std::vector<Capture>> later(buckets.size());
  for (size_t stage = 0; stage < later.size(); ++stage) {
    for (int64_t i = 0; i < buckets[stage]; ++i) later[stage].push_back(take());
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
