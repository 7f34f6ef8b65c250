// sim_call: one call of the recording driver by its CUDA name, so that tests can break the rules that the assembler
// keeps.
#include "../common.h"
#include "calls.h"
#include "recording_driver.h"

namespace dgate_rt::graph {
namespace {

using Arguments = std::vector<int64_t>;

template <class Pointer>
Pointer as(int64_t number) {
  return reinterpret_cast<Pointer>(number);
}

template <class Pointer>
int64_t number(Pointer pointer) {
  return reinterpret_cast<int64_t>(pointer);
}

std::vector<Node> nodes_from(const Arguments& in, size_t first) {
  std::vector<Node> nodes;
  for (size_t i = first; i < in.size(); ++i) nodes.push_back(as<Node>(in[i]));
  return nodes;
}

struct Entry {
  const char* name;
  size_t arguments;  // at the least: dependencies follow where a node is added
  Arguments (*make)(const Driver& driver, const char* name, const Arguments& in);
};

constexpr Entry kEntries[] = {
    {"cuGraphCreate", 0,
     [](const Driver& driver, const char* name, const Arguments&) {
       Graph graph = nullptr;
       call(driver, "sim_call", name, driver.create, &graph);
       return Arguments{number(graph)};
     }},
    {"cuGraphDestroy", 1,  // graph
     [](const Driver& driver, const char* name, const Arguments& in) {
       call(driver, "sim_call", name, driver.destroy, as<Graph>(in[0]));
       return Arguments{};
     }},
    {"cuGraphConditionalHandleCreate", 4,  // graph, context, default, flags
     [](const Driver& driver, const char* name, const Arguments& in) {
       Switch handle = 0;
       call(driver, "sim_call", name, driver.create_switch, &handle, as<Graph>(in[0]), as<Context>(in[1]),
            static_cast<uint32_t>(in[2]), static_cast<uint32_t>(in[3]));
       return Arguments{static_cast<int64_t>(handle)};
     }},
    {"cuGraphAddChildGraphNode", 2,  // graph, child, what it waits for
     [](const Driver& driver, const char* name, const Arguments& in) {
       Node node = nullptr;
       const std::vector<Node> after = nodes_from(in, 2);
       call(driver, "sim_call", name, driver.add_child, &node, as<Graph>(in[0]), after.data(), after.size(),
            as<Graph>(in[1]));
       return Arguments{number(node)};
     }},
    {"cuGraphAddNode", 5,  // graph, switch, type, context, size, what it waits for; gives the node and its bodies
     [](const Driver& driver, const char* name, const Arguments& in) {
       Node node = nullptr;
       const std::vector<Node> after = nodes_from(in, 5);
       std::vector<Graph> bodies(static_cast<size_t>(in[4]));
       call(driver, "sim_call", name, driver.add_conditional, &node, as<Graph>(in[0]), after.data(), after.size(),
            static_cast<Switch>(in[1]), static_cast<ConditionalType>(in[2]), as<Context>(in[3]),
            static_cast<uint32_t>(in[4]), bodies.data());
       Arguments out{number(node)};
       for (const Graph body : bodies) out.push_back(number(body));
       return out;
     }},
    {"cuGraphInstantiate", 1,  // graph
     [](const Driver& driver, const char* name, const Arguments& in) {
       Exec exec = nullptr;
       call(driver, "sim_call", name, driver.instantiate, &exec, as<Graph>(in[0]));
       return Arguments{number(exec)};
     }},
    {"cuGraphUpload", 2,  // instantiation, stream
     [](const Driver& driver, const char* name, const Arguments& in) {
       call(driver, "sim_call", name, driver.upload, as<Exec>(in[0]), as<Stream>(in[1]));
       return Arguments{};
     }},
    {"cuGraphLaunch", 2,  // instantiation, stream
     [](const Driver& driver, const char* name, const Arguments& in) {
       call(driver, "sim_call", name, driver.launch, as<Exec>(in[0]), as<Stream>(in[1]));
       return Arguments{};
     }},
    {"cuGraphExecDestroy", 1,  // instantiation
     [](const Driver& driver, const char* name, const Arguments& in) {
       call(driver, "sim_call", name, driver.destroy_exec, as<Exec>(in[0]));
       return Arguments{};
     }},
    {"cudaGraphSetConditional", 2,  // switch, value
     [](const Driver&, const char*, const Arguments& in) {
       set_switch(static_cast<Switch>(in[0]), static_cast<uint32_t>(in[1]));
       return Arguments{};
     }},
    {"set_version", 1,  // 1000 * major + 10 * minor
     [](const Driver&, const char*, const Arguments& in) {
       set_version(static_cast<int>(in[0]));
       return Arguments{};
     }},
    {"fail_after", 1,  // calls
     [](const Driver&, const char*, const Arguments& in) {
       fail_after(in[0]);
       return Arguments{};
     }},
};

}  // namespace

std::vector<int64_t> sim_call(std::string call, std::vector<int64_t> arguments) {
  for (const Entry& entry : kEntries) {
    if (call != entry.name) continue;
    DGATE_CHECK(arguments.size() >= entry.arguments, "arguments: expected at least ", entry.arguments, " for ", call,
                ", got ", arguments.size());
    return entry.make(recording_driver(), entry.name, arguments);
  }
  fail("call: expected one of the recording driver's, got '", call, "'");
}

}  // namespace dgate_rt::graph
