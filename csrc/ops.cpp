// Gives the operators of dgate_rt/ops.py, where their schemas are, their CPU kernels.
#include "cpu/operators.h"

namespace dgate_rt {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

// The compiler, and the torch whose headers it saw.
std::string build_info() { return std::string(kCompiler) + "\n" + TORCH_VERSION; }

}  // namespace
}  // namespace dgate_rt

STABLE_TORCH_LIBRARY_IMPL(dgate_rt, CPU, library) {
  library.impl("gate_score", TORCH_BOX(&dgate_rt::gate_score));
  library.impl("gate_distances", TORCH_BOX(&dgate_rt::gate_distances));
  library.impl("route_", TORCH_BOX(&dgate_rt::route_<dgate_rt::route_on_cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(dgate_rt, CompositeExplicitAutograd, library) {
  library.impl("build_info", TORCH_BOX(&dgate_rt::build_info));
}
