// Calls through the table of the driver, every one of them checked.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "driver.h"

namespace dgate_rt::graph {

// A status that is no success becomes an error that names what was being done, the call and the driver's reason.
template <class... Parameters, class... Arguments>
void call(const Driver& driver, const std::string& what, const char* name, Status (*function)(Parameters...),
          Arguments... arguments) {
  const Status status = function(arguments...);
  if (status == Status::kSuccess) return;
  std::ostringstream message;
  message << what << ": " << name << " failed: " << driver.explain(status) << " (CUDA error "
          << static_cast<int32_t>(status) << ", driver " << driver.name << ')';
  throw std::runtime_error(message.str());
}

inline std::vector<Node> nodes_of(const Driver& driver, const std::string& what, Graph graph) {
  size_t count = 0;
  call(driver, what, "cuGraphGetNodes", driver.nodes, graph, nullptr, &count);
  std::vector<Node> nodes(count);
  if (count > 0) call(driver, what, "cuGraphGetNodes", driver.nodes, graph, nodes.data(), &count);
  return nodes;
}

inline NodeType type_of(const Driver& driver, const std::string& what, Node node) {
  NodeType type{};
  call(driver, what, "cuGraphNodeGetType", driver.type, node, &type);
  return type;
}

inline Graph child_of(const Driver& driver, const std::string& what, Node node) {
  Graph child = nullptr;
  call(driver, what, "cuGraphChildGraphNodeGetGraph", driver.child, node, &child);
  return child;
}

}  // namespace dgate_rt::graph
