// Gives route_ its CUDA kernel: checks, device, stream; the kernel itself is in route.cuh.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../route_tensors.h"
#include "route_arguments.h"

namespace dgate_rt {
namespace {

void route_on_cuda(const RouteTensors& tensors) {
  const auto [route, carried] = check_route(tensors);
  DGATE_CHECK(tensors.ids.is_cuda(), "ids: expected a tensor on cuda, got one on ", place_of(tensors.ids));
  DGATE_CHECK(route.rows <= kMaxRows, "ids: expected at most ", kMaxRows, " rows on cuda, got ", route.rows);
  DGATE_CHECK(route.capacity <= INT32_MAX, "dest_ids: expected at most ", INT32_MAX, " rows, got ", route.capacity);
  DGATE_CHECK(carried.size() <= kMaxTensors, "src: expected at most ", kMaxTensors, " tensors on cuda, got ",
              carried.size());
  RouteArguments arguments{};
  static_cast<Route&>(arguments) = route;
  for (const Rows& rows : carried) {
    if (rows.bytes > 0) arguments.carried[arguments.tensors++] = rows;
  }
  DGATE_CHECK(count_pieces(arguments) < int64_t{1} << 30, "src: expected less than 4 TiB of rows, got ",
              count_pieces(arguments), " pieces of ", kPiece, " bytes");

  const int device = tensors.ids.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  // torch 2.10 and 2.11 have no macro that checks this in every later release too.
  const bool has_stream = aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS;
  STD_TORCH_CHECK(has_stream, "dgate_rt::route_: torch has no current stream for GPU ", device);
  const auto error = static_cast<cudaError_t>(launch_route(arguments, device, stream));
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch of somebody else would find it
  STD_TORCH_CHECK(error == cudaSuccess, "dgate_rt::route_: launch failed: ", cudaGetErrorString(error));
}

}  // namespace
}  // namespace dgate_rt

STABLE_TORCH_LIBRARY_IMPL(dgate_rt, CUDA, library) {
  library.impl("route_", TORCH_BOX(&dgate_rt::route_<dgate_rt::route_on_cuda>));
}
