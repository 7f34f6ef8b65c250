// Builds the chain of segments with the driver's calls. Captures are checked first, because the driver would only say
// "invalid argument", and not of which of them.
#include "assemble.h"

#include "../common.h"
#include "calls.h"

namespace dgate_rt::graph {
namespace {

std::string with_article(NodeType type) {
  const std::string name = name_of(type);
  return (std::string("aeiou").find(name[0]) == std::string::npos ? "a " : "an ") + name;
}

// Throws unless a captured graph may be a child of a switch's body. `path` leads to a graph inside a
// capture: "3." for that of node 3. Captures are all held to it, though CUDA would allow the first some more.
void check_nodes(const Driver& driver, const std::string& name, Graph graph, Context context, const std::string& path) {
  const std::vector<Node> nodes = nodes_of(driver, name, graph);
  DGATE_CHECK(!nodes.empty() || !path.empty(), "captures: ", name, ": expected nodes, got an empty graph");
  for (size_t i = 0; i < nodes.size(); ++i) {
    const std::string number = path + std::to_string(i);
    const NodeType type = type_of(driver, name, nodes[i]);
    DGATE_CHECK(type != NodeType::kConditional, "captures: ", name, ": node ", number,
                " is a conditional; a graph that holds one cannot be a child of another");
    DGATE_CHECK(body_may_hold(type), "captures: ", name, ": node ", number, " is ", with_article(type),
                "; expected only kernels, memory copies, memory sets, empty nodes and child graphs");
    if (type == NodeType::kChildGraph) {
      check_nodes(driver, name, child_of(driver, name, nodes[i]), context, number + '.');
    } else if (type == NodeType::kKernel) {
      Context other = nullptr;
      call(driver, name, "cuGraphKernelNodeGetParams", driver.kernel_context, nodes[i], &other);
      DGATE_CHECK(other == nullptr || other == context, "captures: ", name, ": node ", number,
                  " is a kernel of another context; expected all in the one that is current");
    }
  }
}

void check_driver(const Driver& driver) {
  int version = 0;
  call(driver, "assembly", "cuDriverGetVersion", driver.version, &version);
  DGATE_CHECK(version >= kOldestDriver, "driver: expected CUDA 12.8 or newer, got ", version / 1000, '.',
              version % 1000 / 10);
}

Context current_context(const Driver& driver) {
  Context context = nullptr;
  call(driver, "assembly", "cuCtxGetCurrent", driver.current_context, &context);
  DGATE_CHECK(context != nullptr, "driver: expected a current context on this thread, got none");
  return context;
}

}  // namespace

AssembledGraph::AssembledGraph(const Driver& driver, Stream stream, const Capture& first,
                               const std::vector<Segment>& later)
    : driver_(driver), graph_(nullptr, Destroy{&driver}), exec_(nullptr, Destroy{&driver}) {
  check_driver(driver);
  const Context context = current_context(driver);
  check_nodes(driver, first.name, first.graph, context, "");
  for (const Segment& segment : later) {
    for (const Capture& bucket : segment.buckets) check_nodes(driver, bucket.name, bucket.graph, context, "");
  }

  Graph graph = nullptr;
  call(driver, "assembly", "cuGraphCreate", driver.create, &graph);
  graph_.reset(graph);
  Link link{nullptr, first.name, 0, {}};
  call(driver, first.name, "cuGraphAddChildGraphNode", driver.add_child, &link.node, graph, nullptr, size_t{0},
       first.graph);
  chain_.push_back(std::move(link));
  for (const Segment& segment : later) add_switch(context, segment);

  Exec exec = nullptr;
  call(driver, "assembly", "cuGraphInstantiate", driver.instantiate, &exec, graph);
  exec_.reset(exec);
  call(driver, "assembly", "cuGraphUpload", driver.upload, exec, stream);
}

// Appends a segment. Its switch starts each launch out of range, where no body runs.
void AssembledGraph::add_switch(Context context, const Segment& segment) {
  Link link{nullptr, segment.name, 0, {}};
  const auto size = static_cast<uint32_t>(segment.buckets.size());
  call(driver_, link.name, "cuGraphConditionalHandleCreate", driver_.create_switch, &link.handle, graph_.get(), context,
       size, kAssignDefault);
  std::vector<Graph> bodies(size);
  const Node before = chain_.back().node;
  call(driver_, link.name, "cuGraphAddNode", driver_.add_conditional, &link.node, graph_.get(), &before, size_t{1},
       link.handle, ConditionalType::kSwitch, context, size, bodies.data());
  for (size_t i = 0; i < bodies.size(); ++i) {
    const Capture& bucket = segment.buckets[i];
    Node node = nullptr;
    call(driver_, bucket.name, "cuGraphAddChildGraphNode", driver_.add_child, &node, bodies[i], nullptr, size_t{0},
         bucket.graph);
    link.bodies.push_back({bucket.name, bucket.bucket, bodies[i]});
  }
  switches_.push_back(link.handle);
  chain_.push_back(std::move(link));
}

void AssembledGraph::launch(Stream stream) const {
  call(driver_, "launch", "cuGraphLaunch", driver_.launch, exec_.get(), stream);
}

void AssembledGraph::destroy() {
  const Graph graph = graph_.release();
  const Exec exec = exec_.release();
  const Status status = driver_.destroy_exec(exec);  // the graph goes even where this fails
  const std::string reason = status == Status::kSuccess ? "" : driver_.explain(status);
  call(driver_, "destruction", "cuGraphDestroy", driver_.destroy, graph);
  if (status != Status::kSuccess) throw std::runtime_error("destruction: cuGraphExecDestroy failed: " + reason);
}

}  // namespace dgate_rt::graph
