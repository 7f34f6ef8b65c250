// The recording driver's table: what each call does to the graphs that it keeps, and the rules of CUDA it checks.
#include <algorithm>

#include "recording_state.h"

namespace dgate_rt::graph {
namespace {

constexpr uint64_t kContext = 1;
thread_local std::string failure;  // why the last call of this thread failed

// One call of the table: counted, under the mutex, and with a refusal turned into its status.
template <class Work>
Status answer(Work work) {
  State& known = state();
  const std::lock_guard lock(known.mutex);
  ++known.counts.host_calls;
  try {
    if (known.calls_left >= 0 && known.calls_left-- == 0) {
      refuse(Status::kOutOfMemory, "out of memory, as the simulation was told");
    }
    work(known);
    return Status::kSuccess;
  } catch (const Refusal& refusal) {
    failure = refusal.what();
    return refusal.status;
  }
}

template <class Visit>
void for_each_node(const GraphState& graph, const Visit& visit) {  // child graphs and bodies included
  for (const auto& node : graph.nodes) {
    visit(*node);
    if (node->child) for_each_node(*node->child, visit);
    for (const auto& body : node->bodies) for_each_node(*body, visit);
  }
}

bool in_body(const GraphState& graph) { return graph.is_body || (graph.parent != nullptr && in_body(*graph.parent)); }

GraphState& editable(State& known, Graph graph) {
  GraphState& found = *find(known.graphs, id_of(graph), "graph");
  const GraphState& top = top_of(found);
  if (top.capture) refuse(Status::kInvalidValue, "graph ", found.id, " is captured, and not for changing");
  if (top.instantiations > 0) refuse(Status::kInvalidValue, "graph ", top.id, " is instantiated, and not for changing");
  return found;
}

std::vector<size_t> indices_of(State& known, const GraphState& graph, const Node* after, size_t count) {
  std::vector<size_t> indices;
  for (size_t i = 0; i < count; ++i) {
    const NodeState* node = find(known.nodes, id_of(after[i]), "node");
    const auto is_node = [node](const auto& other) { return other.get() == node; };
    const auto place = std::find_if(graph.nodes.begin(), graph.nodes.end(), is_node);
    if (place == graph.nodes.end()) refuse(Status::kInvalidValue, "node ", node->id, " is not of graph ", graph.id);
    const auto index = static_cast<size_t>(place - graph.nodes.begin());
    if (std::find(indices.begin(), indices.end(), index) != indices.end()) {
      refuse(Status::kInvalidValue, "node ", node->id, " is twice among the dependencies");
    }
    indices.push_back(index);
  }
  return indices;
}

void check_child(const GraphState& parent, const GraphState& child) {
  for_each_node(child, [&](const NodeState& node) {
    if (node.type == NodeType::kConditional) {
      refuse(Status::kInvalidValue, "graph ", child.id,
             " holds a conditional, so it can be neither a child nor cloned");
    }
    if (node.type == NodeType::kMemoryAllocation || node.type == NodeType::kMemoryFree) {
      refuse(Status::kInvalidValue, "graph ", child.id, " holds a ", name_of(node.type), ", so it cannot be cloned");
    }
    if (in_body(parent) && !body_may_hold(node.type)) {
      refuse(Status::kInvalidValue, "graph ", child.id, " holds a ", name_of(node.type),
             ", which the body of a conditional may not");
    }
  });
}

std::shared_ptr<GraphState> clone(State& known, const GraphState& from, GraphState* parent) {
  auto copy = make_graph(known, parent);
  copy->capture = from.capture;
  for (const auto& node : from.nodes) {
    NodeState& made = make_node(known, *copy, node->type);
    made.after = node->after;
    made.context = node->context;
    if (node->child) made.child = clone(known, *node->child, copy.get());
  }
  return copy;
}

Status create_switch(Switch* handle, Graph graph, Context context, uint32_t default_value, uint32_t flags) {
  return answer([&](State& known) {
    GraphState& owner = editable(known, graph);
    if (id_of(context) != kContext) refuse(Status::kInvalidContext, "no context ", id_of(context));
    if (flags & ~kAssignDefault) refuse(Status::kInvalidValue, "no flags ", flags, " of a switch");
    *handle = ++known.last_id;
    ++known.counts.allocations;
    known.switches[*handle] = &owner;
    owner.switches[*handle] = {id_of(context), default_value, flags};
  });
}

Status add_child(Node* node, Graph graph, const Node* after, size_t after_count, Graph child) {
  return answer([&](State& known) {
    GraphState& parent = editable(known, graph);
    const GraphState& copied = *find(known.graphs, id_of(child), "graph");
    const std::vector<size_t> indices = indices_of(known, parent, after, after_count);
    check_child(parent, copied);
    auto copy = clone(known, copied, &parent);  // before its node is there, for a graph may be put into itself
    NodeState& made = make_node(known, parent, NodeType::kChildGraph);
    made.after = indices;
    made.child = std::move(copy);
    *node = as<Node>(made.id);
  });
}

Status add_conditional(Node* node, Graph graph, const Node* after, size_t after_count, Switch handle,
                       ConditionalType type, Context context, uint32_t size, Graph* bodies) {
  return answer([&](State& known) {
    GraphState& parent = editable(known, graph);
    GraphState& top = top_of(parent);
    const std::vector<size_t> indices = indices_of(known, parent, after, after_count);
    if (type != ConditionalType::kSwitch) refuse(Status::kNotSupported, "the simulation knows only SWITCH nodes");
    if (size == 0) refuse(Status::kInvalidValue, "a SWITCH node of no bodies");
    const GraphState* owner = find(known.switches, handle, "switch");
    if (owner != &top) refuse(Status::kInvalidValue, "switch ", handle, " is of graph ", owner->id, ", not ", top.id);
    SwitchState& used = top.switches.at(handle);
    if (used.node != 0) refuse(Status::kInvalidValue, "switch ", handle, " is used by node ", used.node, " already");
    if (used.context != id_of(context)) refuse(Status::kInvalidContext, "switch ", handle, " is of another context");
    NodeState& made = make_node(known, parent, NodeType::kConditional);
    made.after = indices;
    made.context = id_of(context);
    made.handle = handle;
    used.node = made.id;
    for (uint32_t i = 0; i < size; ++i) {
      made.bodies.push_back(make_graph(known, &parent));
      made.bodies.back()->is_body = true;
      bodies[i] = as<Graph>(made.bodies.back()->id);
    }
    *node = as<Node>(made.id);
  });
}

Status instantiate(Exec* exec, Graph graph) {
  return answer([&](State& known) {
    const std::shared_ptr<GraphState> top = find(known.graphs, id_of(graph), "graph");
    if (top->parent != nullptr) refuse(Status::kInvalidValue, "graph ", top->id, " is part of another");
    if (top->capture) refuse(Status::kInvalidValue, "graph ", top->id, " is captured: parts are not instantiated");
    for (const auto& [handle, known_switch] : top->switches) {
      if (known_switch.node == 0) refuse(Status::kInvalidValue, "switch ", handle, " is of no conditional");
    }
    for_each_node(*top, [&](const NodeState& node) {
      if (node.type == NodeType::kConditional && top->instantiations > 0) {
        refuse(Status::kInvalidValue, "graph ", top->id, " holds a conditional and is instantiated already");
      }
      for (const auto& body : node.bodies) {
        for_each_node(*body, [&](const NodeState& kernel) {
          if (kernel.context != 0 && kernel.context != node.context) {
            refuse(Status::kInvalidContext, "node ", kernel.id, " is of context ", kernel.context,
                   ", the conditional around it of ", node.context);
          }
        });
      }
    });
    const auto made = std::make_shared<ExecState>();
    made->id = ++known.last_id;
    made->graph = top;
    ++top->instantiations;
    ++known.counts.allocations;
    known.execs[made->id] = made;
    *exec = as<Exec>(made->id);
  });
}

Status launch(Exec exec, Stream) {
  std::shared_ptr<ExecState> found;  // kept, should it be destroyed while it runs
  const Status status = answer([&](State& known) {
    found = find(known.execs, id_of(exec), "instantiation");
    if (is_running()) refuse(Status::kIllegalState, "launched from within a stage, which stands for device code");
    if (!found->uploaded) refuse(Status::kIllegalState, "launched before it was uploaded");
    ++known.counts.launches;
  });
  if (status != Status::kSuccess) return status;
  try {
    const std::lock_guard one_after_another(found->busy);
    run(*found);
    return Status::kSuccess;
  } catch (const Refusal& refusal) {
    failure = refusal.what();
    return refusal.status;
  }
}

Status list_edges(Graph graph, Node* from, Node* to, size_t* count) {
  return answer([&](State& known) {
    const GraphState& listed = *find(known.graphs, id_of(graph), "graph");
    size_t found = 0;
    for (const auto& node : listed.nodes) {
      for (const size_t before : node->after) {
        if (from != nullptr && found < *count) {
          from[found] = as<Node>(listed.nodes[before]->id);
          to[found] = as<Node>(node->id);
        }
        ++found;
      }
    }
    *count = found;
  });
}

Status list_nodes(Graph graph, Node* nodes, size_t* count) {
  return answer([&](State& known) {
    const GraphState& listed = *find(known.graphs, id_of(graph), "graph");
    for (size_t i = 0; nodes != nullptr && i < std::min(*count, listed.nodes.size()); ++i) {
      nodes[i] = as<Node>(listed.nodes[i]->id);
    }
    *count = listed.nodes.size();
  });
}

Status child_graph(Node node, Graph* graph) {
  return answer([&](State& known) {
    const NodeState* found = find(known.nodes, id_of(node), "node");
    if (!found->child) refuse(Status::kInvalidValue, "node ", found->id, " is no child graph");
    *graph = as<Graph>(found->child->id);
  });
}

Status destroy(Graph graph) {
  return answer([&](State& known) {
    const std::shared_ptr<GraphState> top = find(known.graphs, id_of(graph), "graph");
    if (top->parent != nullptr) refuse(Status::kInvalidValue, "graph ", top->id, " is part of another");
    if (top->capture) top->capture->released = true;
    forget(known, *top);
  });
}

Status destroy_exec(Exec exec) {
  return answer([&](State& known) {
    --find(known.execs, id_of(exec), "instantiation")->graph->instantiations;
    known.execs.erase(id_of(exec));
  });
}

constexpr Driver kDriver{
    .layout = kLayout,
    .name = "recording",
    .version = [](int* version) { return answer([&](State& known) { *version = known.version; }); },
    .current_context = [](Context* context) { return answer([&](State&) { *context = as<Context>(kContext); }); },
    .create =
        [](Graph* graph) { return answer([&](State& known) { *graph = as<Graph>(make_graph(known, nullptr)->id); }); },
    .destroy = destroy,
    .create_switch = create_switch,
    .add_child = add_child,
    .add_conditional = add_conditional,
    .nodes = list_nodes,
    .edges = list_edges,
    .type =
        [](Node node, NodeType* type) {
          return answer([&](State& known) { *type = find(known.nodes, id_of(node), "node")->type; });
        },
    .child = child_graph,
    .kernel_context =
        [](Node node, Context* context) {
          return answer([&](State& known) { *context = as<Context>(find(known.nodes, id_of(node), "node")->context); });
        },
    .instantiate = instantiate,
    .upload =
        [](Exec exec, Stream) {
          return answer([&](State& known) { find(known.execs, id_of(exec), "instantiation")->uploaded = true; });
        },
    .launch = launch,
    .destroy_exec = destroy_exec,
    .explain = [](Status) { return failure.c_str(); },
};

}  // namespace

const Driver& recording_driver() { return kDriver; }

}  // namespace dgate_rt::graph
