#include "pool.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace dgate_rt {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

DGATE_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

DGATE_INLINE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

DGATE_INLINE float widen(float value) { return value; }

DGATE_INLINE float widen(BFloat16 value) { return from_bits(uint32_t{value.bits} << 16); }

// Without branches or a table, so that it vectorises on every machine: sign, exponent and fraction moved to their
// places in a float32 are short of a factor 2^112, exactly, subnormals included; infinity and NaN then need their
// exponent back.
DGATE_INLINE float widen(Float16 value) {
  const uint32_t moved = static_cast<uint32_t>(int32_t{static_cast<int16_t>(value.bits)}) << 13 & 0x8fffe000u;
  const uint32_t special = (moved & 0x0f800000u) == 0x0f800000u ? 0x7f800000u : 0u;
  return from_bits(to_bits(from_bits(moved) * 0x1p112f) | special);
}

template <class T>
DGATE_INLINE float sum(const T* values, int64_t length) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < length; ++i) total += widen(values[i]);
  return total;
}

// totals[c] += values[row * stride + c], four rows at a time: a total is loaded and stored once for four.
template <class T>
DGATE_INLINE void add_rows(const T* values, int64_t rows, int64_t stride, int64_t length, float* totals) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    const T* v0 = values + row * stride;
    const T* v1 = v0 + stride;
    const T* v2 = v1 + stride;
    const T* v3 = v2 + stride;
#pragma omp simd
    for (int64_t c = 0; c < length; ++c) {
      totals[c] += (widen(v0[c]) + widen(v1[c])) + (widen(v2[c]) + widen(v3[c]));
    }
  }
  for (; row < rows; ++row) {
    const T* v = values + row * stride;
#pragma omp simd
    for (int64_t c = 0; c < length; ++c) totals[c] += widen(v[c]);
  }
}

constexpr int64_t kTotals = 1024;  // sums that are held at a time

// out[c * step] = the mean of channel c over height x width elements from `corner` on.
template <class T>
DGATE_INLINE void mean(const Features& features, const T* corner, int64_t height, int64_t width, int64_t first,
                       int64_t last, float* out, int64_t step) {
  const int64_t channel_stride = features.stride[0], row_stride = features.stride[1], stride = features.stride[2];
  const float elements = static_cast<float>(height * width);
  if (height == 1 || row_stride == width * stride) {  // all of it is one run
    width *= height;
    height = 1;
  }
  if (channel_stride == 1 && stride != 1) {
    float totals[kTotals];
    for (int64_t start = first; start < last; start += kTotals) {
      const int64_t length = std::min(kTotals, last - start);
      std::fill(totals, totals + length, 0.0f);
      for (int64_t h = 0; h < height; ++h) add_rows(corner + h * row_stride + start, width, stride, length, totals);
      for (int64_t c = 0; c < length; ++c) out[(start + c) * step] = totals[c] / elements;
    }
    return;
  }
  for (int64_t c = first; c < last; ++c) {
    float total = 0;
    for (int64_t h = 0; h < height; ++h) {
      const T* row = corner + c * channel_stride + h * row_stride;
      if (stride == 1) {
        total += sum(row, width);
      } else {
        for (int64_t w = 0; w < width; ++w) total += widen(row[w * stride]);
      }
    }
    out[c * step] = total / elements;
  }
}

// Where a cell of a grid begins and ends, as those of adaptive_avg_pool2d: rounded outwards, so that cells may overlap.
DGATE_INLINE int64_t begin_of(int64_t cell, int64_t size, int64_t side) { return cell * size / side; }
DGATE_INLINE int64_t end_of(int64_t cell, int64_t size, int64_t side) { return ((cell + 1) * size + side - 1) / side; }

// The means of one plane whose rows are runs: rows are added up first, since those of a cell are too short for SIMD.
template <class T>
DGATE_INLINE void means_of_plane(const Features& features, const T* plane, float* out) {
  const int64_t side = features.side, height = features.size[1], width = features.size[2];
  float totals[kTotals];
  for (int64_t y = 0; y < side; ++y) {
    const int64_t top = begin_of(y, height, side), bottom = end_of(y, height, side);
    std::fill(totals, totals + width, 0.0f);
    add_rows(plane + top * features.stride[1], bottom - top, features.stride[1], width, totals);
    for (int64_t x = 0; x < side; ++x) {
      const int64_t left = begin_of(x, width, side), right = end_of(x, width, side);
      const float elements = static_cast<float>((bottom - top) * (right - left));
      out[y * side + x] = sum(totals + left, right - left) / elements;
    }
  }
}

template <class T>
DGATE_INLINE void means(const Features& features, const T* sample, int64_t first, int64_t last, float* out) {
  const int64_t side = features.side, height = features.size[1], width = features.size[2];
  if (side > 1 && features.stride[2] == 1 && width <= kTotals) {
    for (int64_t c = first; c < last; ++c) {
      means_of_plane(features, sample + c * features.stride[0], out + c * side * side);
    }
    return;
  }
  for (int64_t y = 0; y < side; ++y) {
    for (int64_t x = 0; x < side; ++x) {
      const int64_t top = begin_of(y, height, side), left = begin_of(x, width, side);
      const T* corner = sample + top * features.stride[1] + left * features.stride[2];
      mean(features, corner, end_of(y, height, side) - top, end_of(x, width, side) - left, first, last,
           out + y * side + x, side * side);
    }
  }
}

template <class T>
DGATE_INLINE void unroll(const Features& features, const T* sample, int64_t first, int64_t last, float* out) {
  const int64_t height = features.size[1], width = features.size[2], stride = features.stride[2];
  while (first < last) {
    const int64_t row = first / width, start = first % width;
    const int64_t length = std::min(width - start, last - first);
    const T* values = sample + row / height * features.stride[0] + row % height * features.stride[1] + start * stride;
    if (stride == 1) {
#pragma omp simd
      for (int64_t w = 0; w < length; ++w) out[first + w] = widen(values[w]);
    } else {
      for (int64_t w = 0; w < length; ++w) out[first + w] = widen(values[w * stride]);
    }
    first += length;
  }
}

template <class T>
DGATE_INLINE void pool_elements(const Features& features, int64_t sample, int64_t first, int64_t last, float* out) {
  const T* values = static_cast<const T*>(features.data) + sample * features.sample_stride;
  if (features.side) {
    means(features, values, first, last, out);
  } else {
    unroll(features, values, first, last, out);
  }
}

DGATE_CLONES void pool_float32(const Features& features, int64_t sample, int64_t first, int64_t last, float* out) {
  pool_elements<float>(features, sample, first, last, out);
}

DGATE_CLONES void pool_bfloat16(const Features& features, int64_t sample, int64_t first, int64_t last, float* out) {
  pool_elements<BFloat16>(features, sample, first, last, out);
}

DGATE_CLONES void pool_float16(const Features& features, int64_t sample, int64_t first, int64_t last, float* out) {
  pool_elements<Float16>(features, sample, first, last, out);
}

}  // namespace

void pool(const Features& features, int64_t sample, int64_t first, int64_t last, float* out) {
  switch (features.element) {
    case Element::kFloat32:
      return pool_float32(features, sample, first, last, out);
    case Element::kBFloat16:
      return pool_bfloat16(features, sample, first, last, out);
    case Element::kFloat16:
      return pool_float16(features, sample, first, last, out);
  }
}

}  // namespace dgate_rt
