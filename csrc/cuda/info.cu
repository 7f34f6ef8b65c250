// cuda_info: which CUDA the extension was compiled with, and which one it finds.
#include <cuda_runtime_api.h>

#include "../common.h"

namespace dgate_rt {
namespace {

// Toolkit, runtime and driver version as 1000 * major + 10 * minor, and the number of devices. A missing driver or
// device is an answer, not an error: driver 0, devices 0.
std::vector<int64_t> cuda_info() {
  int runtime = 0, driver = 0, devices = 0;
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) devices = 0;
  cudaGetLastError();  // leave no error behind for others to find
  return {CUDART_VERSION, runtime, driver, devices};
}

}  // namespace
}  // namespace dgate_rt

STABLE_TORCH_LIBRARY_IMPL(dgate_rt, CompositeExplicitAutograd, library) {
  library.impl("cuda_info", TORCH_BOX(&dgate_rt::cuda_info));
}
