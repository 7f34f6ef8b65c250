// Launches the route on a stream; free of torch.
#include <algorithm>

#include "route.cuh"

namespace dgate_rt {

// Two blocks a multiprocessor at most: each of them reads all margins, so no more than keep the memory busy.
int launch_route(const RouteArguments& route, int device, void* stream) {
  int multiprocessors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  constexpr int kWarps = kRouteThreads / 32;
  const int64_t for_rows = (route.rows + kRouteThreads - 1) / kRouteThreads;
  const int64_t for_pieces = (count_pieces(route) + kWarps - 1) / kWarps;
  const int64_t most = 768 / kRouteThreads * multiprocessors;
  const int64_t blocks = std::clamp<int64_t>(std::max(for_rows, for_pieces), 1, most);
  RouteArguments arguments = route;
  void* parameters[] = {&arguments};
  return cudaLaunchKernel(reinterpret_cast<const void*>(&route_kernel<kRouteThreads>),
                          dim3(static_cast<unsigned>(blocks)), dim3(kRouteThreads), parameters, 0,
                          static_cast<cudaStream_t>(stream));
}

}  // namespace dgate_rt
