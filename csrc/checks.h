// Checks that every operator makes of its tensors, on any device. The Python wrappers check more and say it better;
// these keep a direct call through torch.ops from reading or writing out of bounds.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>

#include "common.h"

namespace dgate_rt {

// "cpu" or "cuda:0"
inline std::string place_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "another device, ") + std::to_string(tensor.get_device_index());
}

// `name` must lie at `place` and have exactly this shape and type.
inline void check_tensor(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape, ScalarType dtype,
                         const std::string& place = "cpu") {
  bool same =
      place_of(tensor) == place && tensor.scalar_type() == dtype && tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (int64_t size : shape) same = same && tensor.size(dim++) == size;
  if (!same) {
    std::ostringstream expected;
    const char* comma = "";
    for (int64_t size : shape) {
      expected << comma << size;
      comma = ", ";
    }
    fail(name, ": expected [", expected.str(), "] ", dtype_name(dtype), " on ", place, ", got ", describe(tensor),
         " on ", place_of(tensor));
  }
  const uint64_t address = reinterpret_cast<uint64_t>(tensor.const_data_ptr());
  DGATE_CHECK(address % tensor.element_size() == 0, name, ": expected memory aligned to ", tensor.element_size(),
              " bytes, got an address ", address % tensor.element_size(), " behind one");
}

// The number of live rows: `count`, or all `rows` where there is none. On the CPU.
inline int64_t live_rows(const std::optional<Tensor>& count, int64_t rows) {
  if (!count) return rows;
  check_tensor("count", *count, {}, ScalarType::Int);
  const int64_t live = *count->const_data_ptr<int32_t>();
  DGATE_CHECK(0 <= live && live <= rows, "count: expected 0 to ", rows, ", got ", live);
  return live;
}

}  // namespace dgate_rt
