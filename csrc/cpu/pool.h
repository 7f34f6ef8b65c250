// One vector a sample: the features of a gate, pooled or unrolled, in float32.
#pragma once

#include <cstdint>

namespace dgate_rt {

enum class Element { kFloat32, kBFloat16, kFloat16 };

// Features seen as samples of size[0] x size[1] x size[2] elements at any stride (in elements).
struct Features {
  const void* data;
  Element element;
  bool mean;  // over size[1] and size[2]; else every element is taken, in order
  int64_t sample_stride;
  int64_t size[3];
  int64_t stride[3];

  int64_t width() const { return mean ? size[0] : size[0] * size[1] * size[2]; }
  int64_t elements_per_output() const { return mean ? size[1] * size[2] : 1; }
  // Rows of float32 that can be used where they lie.
  bool ready() const {
    return element == Element::kFloat32 && !mean && size[0] == 1 && size[1] == 1 && (stride[2] == 1 || size[2] == 1);
  }
};

// Writes values first..last-1 of a sample's vector to out[first..last-1]. Each value depends on its own elements and on
// the strides alone, so however the work is cut up the bits are the same.
void pool(const Features& features, int64_t sample, int64_t first, int64_t last, float* out);

}  // namespace dgate_rt
