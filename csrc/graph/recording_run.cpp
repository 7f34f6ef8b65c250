// How the recording driver runs a graph on the host, and what a stage may do to a switch meanwhile.
#include <optional>

#include "recording_state.h"

namespace dgate_rt::graph {
namespace {

struct Value {
  std::optional<uint32_t> value;
  bool set = false, passed = false;
};

struct Run {
  const ExecState& exec;
  std::map<Switch, Value> values;
};
thread_local Run* current = nullptr;  // a stage runs on the thread that launched

void count(int64_t Counts::* counter) {
  const std::lock_guard lock(state().mutex);
  ++(state().counts.*counter);
}

void run_stage(const CaptureState& capture) {
  {
    const std::lock_guard lock(state().mutex);
    if (capture.released) {
      refuse(Status::kIllegalAddress, "use after free: captured graph ", capture.id, " and its memory are gone");
    }
  }
  count(&Counts::stages);
  const int answer = capture.callback();
  if (answer != 0) refuse(Status::kLaunchFailed, "the stage of captured graph ", capture.id, " failed with ", answer);
}

void run_graph(const GraphState& graph);

void run_node(const NodeState& node) {
  if (node.type == NodeType::kChildGraph) return run_graph(*node.child);
  if (node.type != NodeType::kConditional) return;
  count(&Counts::conditionals);
  Value& value = current->values.at(node.handle);
  value.passed = true;
  if (!value.value) {
    refuse(Status::kIllegalState, "switch ", node.handle,
           " has no value: nothing set it, and its default counts only with the flag ASSIGN_DEFAULT");
  }
  if (*value.value < node.bodies.size()) run_graph(*node.bodies[*value.value]);
}

// Of the nodes that are ready the one that was added last runs first, so that a missing edge shows.
void run_graph(const GraphState& graph) {
  if (graph.capture) return run_stage(*graph.capture);
  std::vector<bool> done(graph.nodes.size());
  const auto ready = [&](size_t index) {
    for (const size_t before : graph.nodes[index]->after) {
      if (!done[before]) return false;
    }
    return !done[index];
  };
  for (size_t left = graph.nodes.size(); left > 0; --left) {
    size_t next = graph.nodes.size() - 1;
    while (!ready(next)) --next;  // a node only waits for those that were there before it
    run_node(*graph.nodes[next]);
    done[next] = true;
  }
}

}  // namespace

bool is_running() { return current != nullptr; }

void run(const ExecState& exec) {
  Run started{exec, {}};
  for (const auto& [handle, known] : exec.graph->switches) {
    if (known.flags & kAssignDefault) started.values[handle].value = known.default_value;
    started.values[handle];
  }
  struct Current {
    explicit Current(Run* run) { current = run; }
    ~Current() { current = nullptr; }
  } const guard(&started);
  run_graph(*exec.graph);
}

std::string why_not_set(Switch handle) {
  std::ostringstream why;
  if (current != nullptr && current->values.count(handle) > 0) {
    const Value& mine = current->values.at(handle);
    if (mine.passed) {
      why << "a switch that is yet to come, got switch " << handle << ", which was passed";
    } else if (mine.set) {
      why << "a switch that nothing has set in this launch, got switch " << handle << " again";
    }
    return why.str();
  }
  const std::lock_guard lock(state().mutex);
  const auto known = state().switches.find(handle);
  if (known == state().switches.end()) {
    why << "a switch of the simulated driver, got " << static_cast<int64_t>(handle);
    return why.str();
  }
  why << "a switch of the graph that runs, got switch " << handle << " of graph " << known->second->id << " while ";
  if (current == nullptr) {
    why << "none runs";
  } else {
    why << "graph " << current->exec.graph->id << " runs";
  }
  return why.str();
}

void set_switch(Switch handle, uint32_t value) {
  const std::string why = why_not_set(handle);
  if (!why.empty()) throw std::runtime_error("cudaGraphSetConditional: expected " + why);
  Value& mine = current->values.at(handle);
  mine.value = value;
  mine.set = true;
}

}  // namespace dgate_rt::graph
