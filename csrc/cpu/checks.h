// Checks of the CPU operators. The Python wrappers check more and say it better; these keep a direct call through
// torch.ops from reading or writing out of bounds.
#pragma once

#include <initializer_list>
#include <optional>

#include "../common.h"

namespace dgate_rt {

// `name` must lie on the CPU and have exactly this shape and type.
inline void check_tensor(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                         ScalarType dtype) {
  bool same = tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t dim = 0;
  for (int64_t size : shape) same = same && tensor.size(dim++) == size;
  if (same) return;
  std::ostringstream expected;
  const char* comma = "";
  for (int64_t size : shape) {
    expected << comma << size;
    comma = ", ";
  }
  fail(name, ": expected [", expected.str(), "] ", dtype_name(dtype), " on cpu, got ", describe(tensor),
       tensor.is_cpu() ? " on cpu" : " on another device");
}

// The number of live rows: `count`, or all `rows` where there is none.
inline int64_t live_rows(const std::optional<Tensor>& count, int64_t rows) {
  if (!count) return rows;
  check_tensor("count", *count, {}, ScalarType::Int);
  const int64_t live = *count->const_data_ptr<int32_t>();
  DGATE_CHECK(0 <= live && live <= rows, "count: expected 0 to ", rows, ", got ", live);
  return live;
}

}  // namespace dgate_rt
