// The calls of the CUDA driver that make and run graphs, as one table. It is filled from the driver (cuda_driver.cpp)
// or from a simulation that needs no GPU (recording_driver.cpp). Free of CUDA's headers; the numbers are those of
// CUDA 13.0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dgate_rt::graph {

using Graph = struct OpaqueGraph*;      // CUgraph
using Node = struct OpaqueNode*;        // CUgraphNode
using Exec = struct OpaqueExec*;        // CUgraphExec
using Stream = struct OpaqueStream*;    // CUstream
using Context = struct OpaqueContext*;  // CUcontext
using Switch = uint64_t;                // CUgraphConditionalHandle; 0: none

constexpr int kOldestDriver = 12080;  // brought SWITCH nodes, and mended a hang on empty bodies

enum class NodeType : int32_t {
  kKernel = 0,
  kMemcpy = 1,
  kMemset = 2,
  kHost = 3,
  kChildGraph = 4,
  kEmpty = 5,
  kWaitEvent = 6,
  kEventRecord = 7,
  kSemaphoreSignal = 8,
  kSemaphoreWait = 9,
  kMemoryAllocation = 10,
  kMemoryFree = 11,
  kBatchMemoryOperation = 12,
  kConditional = 13,
};
constexpr int kNodeTypes = 14;

// As messages and dumps call it, and as simulated captures are told to hold it.
inline const char* name_of(NodeType type) {
  constexpr const char* kNames[kNodeTypes] = {"kernel",
                                              "memory copy",
                                              "memory set",
                                              "host call",
                                              "child graph",
                                              "empty node",
                                              "event wait",
                                              "event record",
                                              "semaphore signal",
                                              "semaphore wait",
                                              "memory allocation",
                                              "memory free",
                                              "batch memory operation",
                                              "conditional"};
  const auto index = static_cast<int32_t>(type);
  return 0 <= index && index < kNodeTypes ? kNames[index] : "node of an unknown type";
}

// What the body of a conditional node may hold besides conditional nodes, at any depth.
inline bool body_may_hold(NodeType type) {
  return type == NodeType::kKernel || type == NodeType::kEmpty || type == NodeType::kChildGraph ||
         type == NodeType::kMemset || type == NodeType::kMemcpy;
}

enum class ConditionalType : int32_t { kIf = 0, kWhile = 1, kSwitch = 2 };

constexpr uint32_t kAssignDefault = 1;  // each launch starts from the switch's default

// CUDA has many more; any number but 0 is a failure.
enum class Status : int32_t {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kIllegalState = 401,
  kIllegalAddress = 700,
  kLaunchFailed = 719,
  kNotSupported = 801,
};

// Each call is CUDA's of the name beside it. Lists are asked for as there: with null for their length.
struct Driver {
  int64_t layout;  // kLayout of the sources it was compiled from, for two libraries share it
  const char* name;

  Status (*version)(int* version);              // cuDriverGetVersion
  Status (*current_context)(Context* context);  // cuCtxGetCurrent
  Status (*create)(Graph* graph);               // cuGraphCreate
  Status (*destroy)(Graph graph);               // cuGraphDestroy
  Status (*create_switch)(Switch* handle, Graph graph, Context context, uint32_t default_value,
                          uint32_t flags);  // cuGraphConditionalHandleCreate
  Status (*add_child)(Node* node, Graph graph, const Node* after, size_t after_count,
                      Graph child);  // cuGraphAddChildGraphNode
  Status (*add_conditional)(Node* node, Graph graph, const Node* after, size_t after_count, Switch handle,
                            ConditionalType type, Context context, uint32_t size, Graph* bodies);  // cuGraphAddNode
  Status (*nodes)(Graph graph, Node* nodes, size_t* count);                                        // cuGraphGetNodes
  Status (*edges)(Graph graph, Node* from, Node* to, size_t* count);                               // cuGraphGetEdges
  Status (*type)(Node node, NodeType* type);                                                       // cuGraphNodeGetType
  Status (*child)(Node node, Graph* graph);               // cuGraphChildGraphNodeGetGraph: the node's own, no copy
  Status (*kernel_context)(Node node, Context* context);  // cuGraphKernelNodeGetParams; null where it does not say
  Status (*instantiate)(Exec* exec, Graph graph);         // cuGraphInstantiateWithFlags, with none
  Status (*upload)(Exec exec, Stream stream);             // cuGraphUpload
  Status (*launch)(Exec exec, Stream stream);             // cuGraphLaunch
  Status (*destroy_exec)(Exec exec);                      // cuGraphExecDestroy
  const char* (*explain)(Status status);                  // cuGetErrorString; of the last failure of this thread
};
constexpr int64_t kLayout = 0x64677274'0001;  // raised with every change of Driver

}  // namespace dgate_rt::graph
