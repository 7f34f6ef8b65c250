// What the route kernel is given, and its limits. Free of torch and of CUDA's headers.
#pragma once

#include "../route.h"

namespace dgate_rt {

constexpr int kMaxRows = 65536;     // two bits each: 16 KiB of shared memory
constexpr int kMaxTensors = 64;     // that cross a cut; kernel parameters hold them all
constexpr int kRouteThreads = 384;  // two such blocks a multiprocessor leave each thread the 80 registers it wants
constexpr int kPiece = 4096;        // bytes

// Why nothing was written; bits of `status`.
enum RouteError : int32_t {
  kBadCount = 1,    // count outside of 0 to rows
  kBadWaiting = 2,  // waiting outside of 0 to capacity
  kOverflow = 4,    // more survivors than dest has room for
  kNoBucket = 8,    // more rows than the largest bucket takes
  kBadId = 16,      // an id that is no index of the outputs; all else was written, the answer of that row was not
};

// As kernel parameters.
struct RouteArguments : Route {
  int32_t tensors;
  Rows carried[kMaxTensors];  // fewer than 2^30 pieces in all
};

inline int64_t count_pieces(const RouteArguments& route) {
  int64_t pieces = 0;
  for (int tensor = 0; tensor < route.tensors; ++tensor) pieces += (route.carried[tensor].bytes + kPiece - 1) / kPiece;
  return pieces * route.rows;
}

// Puts the kernel on a stream (a cudaStream_t) of the current device; returns the cudaError_t of the launch.
int launch_route(const RouteArguments& route, int device, void* stream);

}  // namespace dgate_rt
