// What every operator needs: the tensor type of the stable ABI, and errors that name argument, expected and got.
#pragma once

#pragma GCC diagnostic push  // torch's own headers are not free of it
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace dgate_rt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());  // a ValueError in Python
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// "[10, 32] float32"
inline std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) text << (dim ? ", " : "") << tensor.size(dim);
  text << "] " << dtype_name(tensor.scalar_type());
  return text.str();
}

}  // namespace dgate_rt

// Throws a ValueError made of the remaining arguments unless the condition holds.
#define DGATE_CHECK(condition, ...)                  \
  do {                                               \
    if (!(condition)) ::dgate_rt::fail(__VA_ARGS__); \
  } while (0)
