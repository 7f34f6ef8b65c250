// An assembled graph as text: what the driver says of its nodes and edges, and the names that the assembler gave them.
#include <algorithm>
#include <cstdio>
#include <map>

#include "../common.h"
#include "assemble.h"
#include "calls.h"

namespace dgate_rt::graph {
namespace {

// As a string of JSON; DOT takes the same.
std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += std::string{'\\', c};
    } else if (c == '\n') {
      out += "\\n";
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(c));
      out += escape;
    } else {
      out += c;
    }
  }
  return out + '"';
}

// How many nodes of each type a graph holds, those of its child graphs included.
void count_types(const Driver& driver, Graph graph, std::map<NodeType, size_t>& counts) {
  for (const Node node : nodes_of(driver, "describe", graph)) {
    const NodeType type = type_of(driver, "describe", node);
    ++counts[type];
    if (type == NodeType::kChildGraph) count_types(driver, child_of(driver, "describe", node), counts);
  }
}

std::map<NodeType, size_t> holds(const Driver& driver, Node node) {
  std::map<NodeType, size_t> counts;
  count_types(driver, child_of(driver, "describe", node), counts);
  return counts;
}

std::string holds_json(const Driver& driver, Node node) {
  std::ostringstream text;
  const char* comma = "";
  for (const auto& [type, count] : holds(driver, node)) {
    text << comma << quoted(name_of(type)) << ": " << count;
    comma = ", ";
  }
  return '{' + text.str() + '}';
}

std::string holds_label(const Driver& driver, const std::string& name, Node node) {
  std::ostringstream text;
  const char* comma = "\\n";  // a line break of DOT
  for (const auto& [type, count] : holds(driver, node)) {
    text << comma << count << " x " << name_of(type);
    comma = ", ";
  }
  const std::string label = quoted(name);
  return label.substr(0, label.size() - 1) + text.str() + '"';
}

}  // namespace

// Edges as indices of the chain: the top of the graph has one node a link.
std::vector<std::pair<size_t, size_t>> AssembledGraph::edges() const {
  size_t count = 0;
  call(driver_, "describe", "cuGraphGetEdges", driver_.edges, graph_.get(), nullptr, nullptr, &count);
  std::vector<Node> from(count), to(count);
  if (count > 0)
    call(driver_, "describe", "cuGraphGetEdges", driver_.edges, graph_.get(), from.data(), to.data(), &count);
  const auto index = [this](Node node) {
    const auto same = [node](const Link& link) { return link.node == node; };
    return static_cast<size_t>(std::find_if(chain_.begin(), chain_.end(), same) - chain_.begin());
  };
  std::vector<std::pair<size_t, size_t>> indices(count);
  for (size_t i = 0; i < count; ++i) indices[i] = {index(from[i]), index(to[i])};
  return indices;
}

std::string AssembledGraph::json() const {
  std::ostringstream text;
  int version = 0;
  call(driver_, "describe", "cuDriverGetVersion", driver_.version, &version);
  text << "{\"driver\": " << quoted(driver_.name) << ", \"version\": " << version << ", \"nodes\": [";
  for (size_t i = 0; i < chain_.size(); ++i) {
    const Link& link = chain_[i];
    text << (i ? ", " : "") << "{\"id\": " << i << ", \"name\": " << quoted(link.name)
         << ", \"type\": " << quoted(name_of(type_of(driver_, "describe", link.node)));
    if (link.bodies.empty()) {
      text << ", \"holds\": " << holds_json(driver_, link.node) << '}';
      continue;
    }
    text << ", \"switch\": " << static_cast<int64_t>(link.handle) << ", \"default\": " << link.bodies.size()
         << ", \"bodies\": [";
    for (size_t body = 0; body < link.bodies.size(); ++body) {
      text << (body ? ", " : "") << "{\"value\": " << body << ", \"bucket\": " << link.bodies[body].bucket
           << ", \"name\": " << quoted(link.bodies[body].name) << ", \"nodes\": [";
      const char* comma = "";
      for (const Node node : nodes_of(driver_, "describe", link.bodies[body].graph)) {
        text << comma << "{\"type\": " << quoted(name_of(type_of(driver_, "describe", node)))
             << ", \"holds\": " << holds_json(driver_, node) << '}';
        comma = ", ";
      }
      text << "]}";
    }
    text << "]}";
  }
  text << "], \"edges\": [";
  const char* comma = "";
  for (const auto& [from, to] : edges()) {
    text << comma << '[' << from << ", " << to << ']';
    comma = ", ";
  }
  text << "]}";
  return text.str();
}

std::string AssembledGraph::dot() const {
  std::ostringstream text;
  text << "digraph assembled {\n  node [shape=box];\n";
  for (size_t i = 0; i < chain_.size(); ++i) {
    const Link& link = chain_[i];
    if (link.bodies.empty()) {
      text << "  n" << i << " [label=" << holds_label(driver_, link.name, link.node) << "];\n";
      continue;
    }
    text << "  n" << i << " [shape=diamond, label=" << quoted("switch of " + link.name) << "];\n";
    for (size_t body = 0; body < link.bodies.size(); ++body) {
      const std::string id = "b" + std::to_string(i) + '_' + std::to_string(body);
      size_t index = 0;
      text << "  subgraph cluster_" << id << " {\n    label=" << quoted(link.bodies[body].name) << ";\n";
      for (const Node node : nodes_of(driver_, "describe", link.bodies[body].graph)) {
        text << "    " << id << '_' << index++ << " [label=" << holds_label(driver_, link.bodies[body].name, node)
             << "];\n";
      }
      text << "  }\n  n" << i << " -> " << id << "_0 [style=dashed, label=" << quoted(std::to_string(body)) << "];\n";
    }
  }
  for (const auto& [from, to] : edges()) text << "  n" << from << " -> n" << to << ";\n";
  text << "}\n";
  return text.str();
}

std::string AssembledGraph::describe(const std::string& format) const {
  DGATE_CHECK(format == "json" || format == "dot", "format: expected 'json' or 'dot', got '", format, "'");
  return format == "json" ? json() : dot();
}

}  // namespace dgate_rt::graph
