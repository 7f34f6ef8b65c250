// The table of driver calls, filled from the CUDA driver. Each function is fetched at the version whose signature is
// written here, so that neither the toolkit nor the driver at hand can change it; nothing links against libcuda.
//
// Compiled against CUDA 13.0, it has run on a driver of that version. What it hands on is thin on purpose.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "../common.h"
#include "driver.h"

#if CUDA_VERSION >= 12080
#include <cudaTypedefs.h>

namespace dgate_rt::graph {
namespace {

#define DGATE_SAME(ours, theirs) static_assert(static_cast<int64_t>(ours) == static_cast<int64_t>(theirs))
DGATE_SAME(NodeType::kKernel, CU_GRAPH_NODE_TYPE_KERNEL);
DGATE_SAME(NodeType::kMemcpy, CU_GRAPH_NODE_TYPE_MEMCPY);
DGATE_SAME(NodeType::kMemset, CU_GRAPH_NODE_TYPE_MEMSET);
DGATE_SAME(NodeType::kHost, CU_GRAPH_NODE_TYPE_HOST);
DGATE_SAME(NodeType::kChildGraph, CU_GRAPH_NODE_TYPE_GRAPH);
DGATE_SAME(NodeType::kEmpty, CU_GRAPH_NODE_TYPE_EMPTY);
DGATE_SAME(NodeType::kWaitEvent, CU_GRAPH_NODE_TYPE_WAIT_EVENT);
DGATE_SAME(NodeType::kEventRecord, CU_GRAPH_NODE_TYPE_EVENT_RECORD);
DGATE_SAME(NodeType::kSemaphoreSignal, CU_GRAPH_NODE_TYPE_EXT_SEMAS_SIGNAL);
DGATE_SAME(NodeType::kSemaphoreWait, CU_GRAPH_NODE_TYPE_EXT_SEMAS_WAIT);
DGATE_SAME(NodeType::kMemoryAllocation, CU_GRAPH_NODE_TYPE_MEM_ALLOC);
DGATE_SAME(NodeType::kMemoryFree, CU_GRAPH_NODE_TYPE_MEM_FREE);
DGATE_SAME(NodeType::kBatchMemoryOperation, CU_GRAPH_NODE_TYPE_BATCH_MEM_OP);
DGATE_SAME(NodeType::kConditional, CU_GRAPH_NODE_TYPE_CONDITIONAL);
DGATE_SAME(ConditionalType::kIf, CU_GRAPH_COND_TYPE_IF);
DGATE_SAME(ConditionalType::kWhile, CU_GRAPH_COND_TYPE_WHILE);
DGATE_SAME(ConditionalType::kSwitch, CU_GRAPH_COND_TYPE_SWITCH);
DGATE_SAME(kAssignDefault, CU_GRAPH_COND_ASSIGN_DEFAULT);
DGATE_SAME(Status::kSuccess, CUDA_SUCCESS);
DGATE_SAME(Status::kInvalidValue, CUDA_ERROR_INVALID_VALUE);
DGATE_SAME(Status::kOutOfMemory, CUDA_ERROR_OUT_OF_MEMORY);
DGATE_SAME(Status::kInvalidContext, CUDA_ERROR_INVALID_CONTEXT);
DGATE_SAME(Status::kInvalidHandle, CUDA_ERROR_INVALID_HANDLE);
DGATE_SAME(Status::kIllegalState, CUDA_ERROR_ILLEGAL_STATE);
DGATE_SAME(Status::kIllegalAddress, CUDA_ERROR_ILLEGAL_ADDRESS);
DGATE_SAME(Status::kLaunchFailed, CUDA_ERROR_LAUNCH_FAILED);
DGATE_SAME(Status::kNotSupported, CUDA_ERROR_NOT_SUPPORTED);
#undef DGATE_SAME
static_assert(sizeof(Switch) == sizeof(CUgraphConditionalHandle));
static_assert(sizeof(CUresult) == sizeof(Status) && sizeof(CUgraphNodeType) == sizeof(NodeType));

struct Functions {
  PFN_cuDriverGetVersion_v2020 driver_get_version;
  PFN_cuCtxGetCurrent_v4000 ctx_get_current;
  PFN_cuGraphCreate_v10000 graph_create;
  PFN_cuGraphDestroy_v10000 graph_destroy;
  PFN_cuGraphConditionalHandleCreate_v12030 conditional_handle_create;
  PFN_cuGraphAddChildGraphNode_v10000 add_child_graph_node;
  PFN_cuGraphAddNode_v12030 add_node;
  PFN_cuGraphGetNodes_v10000 get_nodes;
  PFN_cuGraphGetEdges_v12030 get_edges;
  PFN_cuGraphNodeGetType_v10000 node_get_type;
  PFN_cuGraphChildGraphNodeGetGraph_v10000 child_get_graph;
  PFN_cuGraphKernelNodeGetParams_v12000 kernel_get_params;
  PFN_cuGraphInstantiateWithFlags_v11040 instantiate;
  PFN_cuGraphUpload_v11010 upload;
  PFN_cuGraphLaunch_v10000 launch;
  PFN_cuGraphExecDestroy_v10000 exec_destroy;
  PFN_cuGetErrorString_v6000 get_error_string;
};
Functions cu;  // filled once, before the table is handed out

template <class Function>
void fetch(Function& function, const char* name, unsigned version) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  // Never the variant of the per-thread default stream: a stream of 0 is the one that torch means by it.
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, version, cudaEnableLegacyStream, &result);
  if (error != cudaSuccess || found == nullptr) {
    cudaGetLastError();  // leave no error behind for others to find
    fail("driver: expected ", name, " of CUDA ", version / 1000, '.', version % 1000 / 10, ", got none (",
         error == cudaSuccess ? "not in this driver" : cudaGetErrorString(error), ")");
  }
  function = reinterpret_cast<Function>(found);
}

CUgraph cuda(Graph graph) { return reinterpret_cast<CUgraph>(graph); }
CUgraphNode cuda(Node node) { return reinterpret_cast<CUgraphNode>(node); }
CUgraphExec cuda(Exec exec) { return reinterpret_cast<CUgraphExec>(exec); }
CUstream cuda(Stream stream) { return reinterpret_cast<CUstream>(stream); }
CUcontext cuda(Context context) { return reinterpret_cast<CUcontext>(context); }
CUgraph* cuda(Graph* graph) { return reinterpret_cast<CUgraph*>(graph); }
CUgraphNode* cuda(Node* node) { return reinterpret_cast<CUgraphNode*>(node); }
const CUgraphNode* cuda(const Node* node) { return reinterpret_cast<const CUgraphNode*>(node); }
Status ours(CUresult result) { return static_cast<Status>(result); }

Status add_conditional(Node* node, Graph graph, const Node* after, size_t after_count, Switch handle,
                       ConditionalType type, Context context, uint32_t size, Graph* bodies) {
  CUgraphNodeParams parameters{};  // what is unused must be zero
  parameters.type = CU_GRAPH_NODE_TYPE_CONDITIONAL;
  parameters.conditional.handle = handle;
  parameters.conditional.type = static_cast<CUgraphConditionalNodeType>(type);
  parameters.conditional.size = size;
  parameters.conditional.ctx = cuda(context);
  const CUresult result = cu.add_node(cuda(node), cuda(graph), cuda(after), nullptr, after_count, &parameters);
  if (result == CUDA_SUCCESS) std::copy_n(parameters.conditional.phGraph_out, size, cuda(bodies));
  return ours(result);
}

// A kernel that is given as a CUfunction does not say where it runs; its context is that of its module.
Status kernel_context(Node node, Context* context) {
  CUDA_KERNEL_NODE_PARAMS_v2 parameters{};
  const CUresult result = cu.kernel_get_params(cuda(node), &parameters);
  *context = parameters.func == nullptr ? reinterpret_cast<Context>(parameters.ctx) : nullptr;
  return ours(result);
}

const char* explain(Status status) {
  const char* text = nullptr;
  return cu.get_error_string(static_cast<CUresult>(status), &text) == CUDA_SUCCESS ? text : "unknown error";
}

constexpr Driver kDriver{
    .layout = kLayout,
    .name = "cuda",
    .version = [](int* version) { return ours(cu.driver_get_version(version)); },
    .current_context = [](Context* context) { return ours(cu.ctx_get_current(reinterpret_cast<CUcontext*>(context))); },
    .create = [](Graph* graph) { return ours(cu.graph_create(cuda(graph), 0)); },
    .destroy = [](Graph graph) { return ours(cu.graph_destroy(cuda(graph))); },
    .create_switch =
        [](Switch* handle, Graph graph, Context context, uint32_t default_value, uint32_t flags) {
          CUgraphConditionalHandle created = 0;
          const CUresult result =
              cu.conditional_handle_create(&created, cuda(graph), cuda(context), default_value, flags);
          *handle = created;
          return ours(result);
        },
    .add_child =
        [](Node* node, Graph graph, const Node* after, size_t after_count, Graph child) {
          return ours(cu.add_child_graph_node(cuda(node), cuda(graph), cuda(after), after_count, cuda(child)));
        },
    .add_conditional = add_conditional,
    .nodes = [](Graph graph, Node* nodes,
                size_t* count) { return ours(cu.get_nodes(cuda(graph), cuda(nodes), count)); },
    .edges = [](Graph graph, Node* from, Node* to,
                size_t* count) { return ours(cu.get_edges(cuda(graph), cuda(from), cuda(to), nullptr, count)); },
    .type = [](Node node,
               NodeType* type) { return ours(cu.node_get_type(cuda(node), reinterpret_cast<CUgraphNodeType*>(type))); },
    .child = [](Node node, Graph* graph) { return ours(cu.child_get_graph(cuda(node), cuda(graph))); },
    .kernel_context = kernel_context,
    .instantiate =
        [](Exec* exec, Graph graph) {
          return ours(cu.instantiate(reinterpret_cast<CUgraphExec*>(exec), cuda(graph), 0));
        },
    .upload = [](Exec exec, Stream stream) { return ours(cu.upload(cuda(exec), cuda(stream))); },
    .launch = [](Exec exec, Stream stream) { return ours(cu.launch(cuda(exec), cuda(stream))); },
    .destroy_exec = [](Exec exec) { return ours(cu.exec_destroy(cuda(exec))); },
    .explain = explain,
};

Functions fetch_all() {
  Functions all{};
  fetch(all.driver_get_version, "cuDriverGetVersion", 2020);
  fetch(all.ctx_get_current, "cuCtxGetCurrent", 4000);
  fetch(all.graph_create, "cuGraphCreate", 10000);
  fetch(all.graph_destroy, "cuGraphDestroy", 10000);
  fetch(all.conditional_handle_create, "cuGraphConditionalHandleCreate", 12030);
  fetch(all.add_child_graph_node, "cuGraphAddChildGraphNode", 10000);
  fetch(all.add_node, "cuGraphAddNode", 12030);
  fetch(all.get_nodes, "cuGraphGetNodes", 10000);
  fetch(all.get_edges, "cuGraphGetEdges", 12030);
  fetch(all.node_get_type, "cuGraphNodeGetType", 10000);
  fetch(all.child_get_graph, "cuGraphChildGraphNodeGetGraph", 10000);
  fetch(all.kernel_get_params, "cuGraphKernelNodeGetParams", 12000);
  fetch(all.instantiate, "cuGraphInstantiateWithFlags", 11040);
  fetch(all.upload, "cuGraphUpload", 11010);
  fetch(all.launch, "cuGraphLaunch", 10000);
  fetch(all.exec_destroy, "cuGraphExecDestroy", 10000);
  fetch(all.get_error_string, "cuGetErrorString", 6000);
  return all;
}

// The address of the table, for the assembler in the other library.
int64_t cuda_graph_driver() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) version = 0;
  cudaGetLastError();
  DGATE_CHECK(version > 0, "driver: expected CUDA 12.8 or newer, got no driver");
  DGATE_CHECK(version >= kOldestDriver, "driver: expected CUDA 12.8 or newer, got ", version / 1000, '.',
              version % 1000 / 10);
  static const bool filled = (cu = fetch_all(), true);  // once; again where it threw
  (void)filled;
  return reinterpret_cast<int64_t>(&kDriver);
}

}  // namespace
}  // namespace dgate_rt::graph

#else  // the toolkit knows no SWITCH

namespace dgate_rt::graph {
namespace {

int64_t cuda_graph_driver() {
  fail("driver: expected an extension built with CUDA 12.8 or newer, got one of ", CUDA_VERSION / 1000, '.',
       CUDA_VERSION % 1000 / 10);
}

}  // namespace
}  // namespace dgate_rt::graph

#endif

STABLE_TORCH_LIBRARY_IMPL(dgate_rt, CompositeExplicitAutograd, library) {
  library.impl("cuda_graph_driver", TORCH_BOX(&dgate_rt::graph::cuda_graph_driver));
}
