// One vector a sample: the features of a gate, pooled or unrolled, in float32.
#pragma once

#include <cstdint>

namespace dgate_rt {

enum class Element { kFloat32, kBFloat16, kFloat16 };

// Features seen as samples of size[0] x size[1] x size[2] elements at any stride (in elements).
struct Features {
  const void* data;
  Element element;
  int64_t side;  // a channel's size[1] x size[2] become side x side means; 0 takes every element, in order
  int64_t sample_stride;
  int64_t size[3];
  int64_t stride[3];

  // A vector is made in units: of a channel all its means, or one element.
  int64_t units() const { return side ? size[0] : size[0] * size[1] * size[2]; }
  int64_t values_per_unit() const { return side ? side * side : 1; }
  int64_t elements_per_unit() const { return side ? size[1] * size[2] : 1; }
  int64_t width() const { return units() * values_per_unit(); }
  // Rows of float32 that can be used where they lie.
  bool ready() const {
    return element == Element::kFloat32 && !side && size[0] == 1 && size[1] == 1 && (stride[2] == 1 || size[2] == 1);
  }
};

// Writes units first..last-1 of a sample's vector to their places in out[0..width-1]. Each value depends on its own
// elements and on the strides alone, so however the work is cut up the bits are the same.
void pool(const Features& features, int64_t sample, int64_t first, int64_t last, float* out);

}  // namespace dgate_rt
