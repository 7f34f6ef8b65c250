// The recording driver's objects: how they come to be, captured graphs among them, how they end, and what is counted.
#include "recording_state.h"

#include <algorithm>
#include <cctype>

namespace dgate_rt::graph {
namespace {

// Reads "kernel, child graph(kernel@2, host call)" into the nodes of a graph, each after the one before it.
class NodeReader {
 public:
  NodeReader(State& state, const std::string& text) : state_(state), text_(text) {}

  void read_all(GraphState& graph) {
    if (skip(' ') && at_ == text_.size()) return;  // no nodes at all
    read_list(graph);
    if (at_ != text_.size()) expected("a comma or the end");
  }

 private:
  void read_list(GraphState& graph) {
    do {
      read_node(graph);
    } while (take(','));
  }

  void read_node(GraphState& graph) {
    skip(' ');
    int type = kNodeTypes;
    std::string name;
    while (at_ < text_.size() && (std::isalpha(static_cast<unsigned char>(text_[at_])) || text_[at_] == ' ')) {
      name += text_[at_++];
    }
    name.erase(name.find_last_not_of(' ') + 1);
    for (int known = 0; known < kNodeTypes; ++known) {
      if (name == name_of(static_cast<NodeType>(known))) type = known;
    }
    if (type == kNodeTypes) expected("the type of a node", name);

    NodeState& node = make_node(state_, graph, static_cast<NodeType>(type));
    if (graph.nodes.size() > 1) node.after.push_back(graph.nodes.size() - 2);
    if (node.type == NodeType::kKernel) node.context = take('@') ? read_number() : 1;
    if (node.type != NodeType::kChildGraph) return;
    node.child = make_graph(state_, &graph);
    if (!take('(')) expected("'('");
    if (take(')')) return;
    read_list(*node.child);
    if (!take(')')) expected("')'");
  }

  uint64_t read_number() {
    uint64_t number = 0;
    while (at_ < text_.size() && std::isdigit(static_cast<unsigned char>(text_[at_]))) {
      number = number * 10 + static_cast<uint64_t>(text_[at_++] - '0');
    }
    return number;
  }

  bool skip(char blank) {
    while (at_ < text_.size() && text_[at_] == blank) ++at_;
    return true;
  }

  bool take(char wanted) {
    skip(' ');
    if (at_ == text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }

  [[noreturn]] void expected(const char* what, const std::string& got = "") const {
    throw std::invalid_argument("nodes: expected " + std::string(what) + ", got '" +
                                (got.empty() ? text_.substr(at_) : got) + "' in '" + text_ + "'");
  }

  State& state_;
  const std::string& text_;
  size_t at_ = 0;
};

}  // namespace

State& state() {
  static State* const kept = new State;  // never ended: Python may still hold graphs when statics go
  return *kept;
}

std::shared_ptr<GraphState> make_graph(State& state, GraphState* parent) {
  const auto made = std::make_shared<GraphState>();
  made->id = ++state.last_id;
  made->parent = parent;
  ++state.counts.allocations;
  state.graphs[made->id] = made;
  return made;
}

NodeState& make_node(State& state, GraphState& graph, NodeType type) {
  graph.nodes.push_back(std::make_unique<NodeState>());
  NodeState& made = *graph.nodes.back();
  made.id = ++state.last_id;
  made.type = type;
  made.graph = &graph;
  ++state.counts.allocations;
  state.nodes[made.id] = &made;
  return made;
}

// The caller holds the graph: this takes away all ways to it.
void forget(State& state, GraphState& graph) {
  for (const auto& node : graph.nodes) {
    state.nodes.erase(node->id);
    if (node->child) forget(state, *node->child);
    for (const auto& body : node->bodies) forget(state, *body);
  }
  for (const auto& [handle, unused] : graph.switches) state.switches.erase(handle);
  state.graphs.erase(graph.id);
}

Graph simulate_capture(int (*callback)(), const std::string& nodes) {
  State& known = state();
  const std::lock_guard lock(known.mutex);
  const std::shared_ptr<GraphState> made = make_graph(known, nullptr);
  made->capture = std::make_shared<CaptureState>(CaptureState{made->id, callback, false});
  try {
    NodeReader(known, nodes).read_all(*made);
  } catch (...) {
    forget(known, *made);
    throw;
  }
  return as<Graph>(made->id);
}

void release_capture(Graph capture) {
  State& known = state();
  const std::lock_guard lock(known.mutex);
  const auto found = known.graphs.find(id_of(capture));
  if (found == known.graphs.end() || !found->second->capture || found->second->parent != nullptr) {
    throw std::invalid_argument("capture: expected one that was simulated and not released, got " +
                                std::to_string(id_of(capture)));
  }
  const std::shared_ptr<GraphState> held = found->second;
  held->capture->released = true;
  forget(known, *held);
}

Counts counts() {
  State& known = state();
  const std::lock_guard lock(known.mutex);
  Counts counted = known.counts;
  counted.live = static_cast<int64_t>(known.switches.size() + known.execs.size());
  counted.live_captures = 0;
  for (const auto& [id, graph] : known.graphs) {
    const bool captured = top_of(*graph).capture != nullptr;
    counted.live += captured ? 0 : 1;
    counted.live_captures += captured && graph->parent == nullptr ? 1 : 0;
  }
  return counted;
}

void reset_counts() {
  const std::lock_guard lock(state().mutex);
  state().counts = {};
}

void set_version(int version) {
  const std::lock_guard lock(state().mutex);
  state().version = version;
}

void fail_after(int64_t calls) {
  const std::lock_guard lock(state().mutex);
  state().calls_left = calls;
}

}  // namespace dgate_rt::graph
