// What the recording driver keeps: graphs, nodes, switches and instantiations by number, and how it refuses.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "recording_driver.h"

namespace dgate_rt::graph {

struct Refusal : std::runtime_error {
  Status status;
  Refusal(Status why, const std::string& text) : std::runtime_error(text), status(why) {}
};

template <class... Parts>
[[noreturn]] void refuse(Status status, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Refusal(status, text.str());
}

struct CaptureState {
  uint64_t id;
  int (*callback)();
  bool released;
};

struct GraphState;

struct NodeState {
  uint64_t id;
  NodeType type;
  GraphState* graph;
  std::vector<size_t> after;  // indices in the graph
  uint64_t context = 0;       // of a kernel or a conditional

  std::shared_ptr<GraphState> child;
  Switch handle = 0;  // this and bodies: of a conditional
  std::vector<std::shared_ptr<GraphState>> bodies;
};

struct SwitchState {
  uint64_t context;
  uint32_t default_value, flags;
  uint64_t node = 0;  // that uses it
};

struct GraphState {
  uint64_t id;
  GraphState* parent;  // that holds it as a child or a body
  bool is_body = false;
  int64_t instantiations = 0;
  std::shared_ptr<CaptureState> capture;  // shared by a captured graph and its copies
  std::vector<std::unique_ptr<NodeState>> nodes;
  std::map<Switch, SwitchState> switches;
};

struct ExecState {
  uint64_t id;
  std::shared_ptr<GraphState> graph;
  bool uploaded = false;
  std::mutex busy;  // launches of one instantiation follow one another
};

struct State {
  std::mutex mutex;
  uint64_t last_id = 0;  // of whatever kind
  std::map<uint64_t, std::shared_ptr<GraphState>> graphs;
  std::map<uint64_t, NodeState*> nodes;
  std::map<Switch, GraphState*> switches;
  std::map<uint64_t, std::shared_ptr<ExecState>> execs;
  Counts counts{};
  int version = 13000;
  int64_t calls_left = -1;
};
State& state();

template <class Pointer>
uint64_t id_of(Pointer pointer) {
  return reinterpret_cast<uint64_t>(pointer);
}
template <class Pointer>
Pointer as(uint64_t id) {
  return reinterpret_cast<Pointer>(id);
}

template <class Value>
Value& find(std::map<uint64_t, Value>& known, uint64_t id, const char* kind) {
  const auto found = known.find(id);
  if (found == known.end()) refuse(Status::kInvalidHandle, "no ", kind, ' ', id, ": never made, or destroyed");
  return found->second;
}

inline GraphState& top_of(GraphState& graph) { return graph.parent == nullptr ? graph : top_of(*graph.parent); }

std::shared_ptr<GraphState> make_graph(State& state, GraphState* parent);
NodeState& make_node(State& state, GraphState& graph, NodeType type);
void forget(State& state, GraphState& graph);

// Runs an instantiation to its end on this thread; throws Refusal. Not under the mutex, for its stages come back here.
void run(const ExecState& exec);
bool is_running();  // whether this thread is in a stage

}  // namespace dgate_rt::graph
