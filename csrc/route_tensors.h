// route_ as torch calls it, on any device: its arguments as they come, and checked, as the kernels take them.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "route.h"

namespace dgate_rt {

struct RouteTensors {
  const std::vector<Tensor>& src;
  const Tensor &ids, &margin, &label;
  const std::optional<Tensor>& count;
  const Tensor& thresholds;
  int64_t gate;
  const std::vector<Tensor>& dest;
  const Tensor &dest_ids, &dest_count, &out_labels, &out_scores, &out_exits;
  const std::optional<Tensor>&waiting, &buckets, &bucket, &handles, &status;
};

// The schema of dgate_rt/ops.py, for the function that does the work on one kind of device.
template <void (*run)(const RouteTensors&)>
void route_(const std::vector<Tensor>& src, const Tensor& ids, const Tensor& margin, const Tensor& label,
            const std::optional<Tensor>& count, const Tensor& thresholds, int64_t gate, const std::vector<Tensor>& dest,
            const Tensor& dest_ids, const Tensor& dest_count, const Tensor& out_labels, const Tensor& out_scores,
            const Tensor& out_exits, const std::optional<Tensor>& waiting, const std::optional<Tensor>& buckets,
            const std::optional<Tensor>& bucket, const std::optional<Tensor>& handles,
            const std::optional<Tensor>& status) {
  run({src, ids, margin, label, count, thresholds, gate, dest, dest_ids, dest_count, out_labels, out_scores, out_exits,
       waiting, buckets, bucket, handles, status});
}

template <class T>
Vector<const T> reading(const Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.stride(0)};
}

template <class T>
Vector<T> writing(const Tensor& tensor) {
  return {tensor.mutable_data_ptr<T>(), tensor.stride(0)};
}

// The memory of one argument: `extent` bytes, `times` over, `step` bytes from one to the next.
struct Span {
  const char* name;
  const char *begin, *end;
  int64_t step, extent, times;

  static Span of(const char* name, const Tensor& tensor) {
    const char* begin = static_cast<const char*>(tensor.const_data_ptr());
    const int64_t element = static_cast<int64_t>(tensor.element_size());
    const int64_t step = tensor.dim() ? tensor.stride(0) * element : 0;
    int64_t last = 0;  // of a row
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      if (tensor.size(dim) == 0) return {name, begin, begin, step, 0, 0};
      if (dim > 0) last += (tensor.size(dim) - 1) * tensor.stride(dim);
    }
    const int64_t extent = (last + 1) * element, rows = tensor.dim() ? tensor.size(0) : 1;
    return {name, begin, begin + (rows - 1) * step + extent, step, extent, rows};
  }

  bool meets(const Span& other) const {
    if (begin >= other.end || other.begin >= end) return false;
    if (step != other.step || step <= 0) return true;
    const int64_t shift = ((begin - other.begin) % step + step) % step;  // columns of one table do not meet
    return shift < other.extent || step - shift < extent;
  }
};

// What is written must be memory of its own: rows run in no particular order, and on CUDA all at once.
inline void check_separate(const RouteTensors& in) {
  std::vector<Span> written{Span::of("dest_ids", in.dest_ids), Span::of("dest_count", in.dest_count),
                            Span::of("out_labels", in.out_labels), Span::of("out_scores", in.out_scores),
                            Span::of("out_exits", in.out_exits)};
  std::vector<Span> others{Span::of("ids", in.ids), Span::of("margin", in.margin), Span::of("label", in.label),
                           Span::of("thresholds", in.thresholds)};
  const auto add = [](std::vector<Span>& spans, const char* name, const std::optional<Tensor>& tensor) {
    if (tensor) spans.push_back(Span::of(name, *tensor));
  };
  add(written, "bucket", in.bucket);
  add(written, "status", in.status);
  add(others, "count", in.count);
  add(others, "waiting", in.waiting);
  add(others, "buckets", in.buckets);
  add(others, "handles", in.handles);
  for (const Tensor& tensor : in.src) others.push_back(Span::of("src", tensor));
  for (const Tensor& tensor : in.dest) written.push_back(Span::of("dest", tensor));
  for (const Span& span : written) {
    DGATE_CHECK(span.times < 2 || span.step != 0, span.name,
                ": expected memory of its own for every element, got a stride of 0");
    for (const Span& other : others) {
      DGATE_CHECK(!span.meets(other), span.name, ": expected memory of its own, got some that ", other.name, " uses");
    }
    others.push_back(span);
  }
}

inline int64_t row_elements(const Tensor& rows) {
  int64_t elements = 1;
  for (int64_t dim = 1; dim < rows.dim(); ++dim) elements *= rows.size(dim);
  return elements;
}

// Whether a row occupies one run of memory, in whatever order of its dimensions.
inline bool dense_rows(const Tensor& rows) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t dim = 1; dim < rows.dim(); ++dim) {
    if (rows.size(dim) != 1) dims.emplace_back(rows.stride(dim), rows.size(dim));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline bool same_rows(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim() || a.scalar_type() != b.scalar_type()) return false;
  for (int64_t dim = 1; dim < a.dim(); ++dim) {
    if (a.size(dim) != b.size(dim)) return false;
  }
  return true;
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t dim = 1; dim < a.dim(); ++dim) {
    if (a.size(dim) != 1 && a.stride(dim) != b.stride(dim)) return false;
  }
  return true;
}

inline std::string strides_of_rows(const Tensor& rows) {
  std::ostringstream text;
  text << '(';
  for (int64_t dim = 1; dim < rows.dim(); ++dim) text << (dim > 1 ? ", " : "") << rows.stride(dim);
  text << ')';
  return text.str();
}

// The rows of one tensor that crosses the cut; no bytes where there is nothing to copy.
inline Rows match_rows(size_t index, const Tensor& src, const Tensor& dest, int64_t rows, int64_t capacity,
                       const std::string& place) {
  DGATE_CHECK(place_of(src) == place && src.dim() > 0 && src.size(0) == rows, "src[", index, "]: expected ", rows,
              " rows on ", place, ", got ", describe(src), " on ", place_of(src));
  DGATE_CHECK(place_of(dest) == place && same_rows(src, dest) && dest.size(0) == capacity, "dest[", index,
              "]: expected ", capacity, " rows on ", place, " like those of src[", index, "] ", describe(src), ", got ",
              describe(dest), " on ", place_of(dest));
  const int64_t element = static_cast<int64_t>(src.element_size());
  Rows matched{static_cast<const char*>(src.const_data_ptr()), static_cast<char*>(dest.mutable_data_ptr()),
               src.stride(0) * element, dest.stride(0) * element, row_elements(src) * element};
  if (matched.bytes == 0 || rows == 0 || capacity == 0) {  // strides of an empty tensor mean nothing
    matched.bytes = 0;
    return matched;
  }
  DGATE_CHECK(dense_rows(src), "src[", index, "]: expected each row in one run of memory, got strides ",
              strides_of_rows(src), " for ", describe(src));
  DGATE_CHECK(same_strides(src, dest), "dest[", index, "]: expected rows with strides ", strides_of_rows(src),
              " like those of src[", index, "], got ", strides_of_rows(dest));
  DGATE_CHECK(capacity < 2 || matched.dest_stride >= matched.bytes, "dest[", index,
              "]: expected rows that do not overlap, got a stride of ", dest.stride(0));
  return matched;
}

struct CheckedRoute {
  Route route;
  std::vector<Rows> carried;
};

// Everything that can be known without reading a tensor; all must lie where ids lie.
inline CheckedRoute check_route(const RouteTensors& in) {
  const auto length = [](const Tensor& vector) { return vector.dim() == 1 ? vector.size(0) : 0; };
  const std::string place = place_of(in.ids);
  const int64_t rows = length(in.ids), capacity = length(in.dest_ids), samples = length(in.out_labels);
  const int64_t gates = length(in.thresholds);
  check_tensor("ids", in.ids, {rows}, ScalarType::Long, place);
  check_tensor("margin", in.margin, {rows}, ScalarType::Float, place);
  check_tensor("label", in.label, {rows}, ScalarType::Long, place);
  check_tensor("thresholds", in.thresholds, {gates}, ScalarType::Float, place);
  check_tensor("dest_ids", in.dest_ids, {capacity}, ScalarType::Long, place);
  check_tensor("dest_count", in.dest_count, {}, ScalarType::Int, place);
  check_tensor("out_labels", in.out_labels, {samples}, ScalarType::Long, place);
  check_tensor("out_scores", in.out_scores, {samples}, ScalarType::Float, place);
  check_tensor("out_exits", in.out_exits, {samples}, ScalarType::Long, place);
  DGATE_CHECK(0 <= in.gate && in.gate < gates, "gate: expected 0 to ", gates - 1, ", got ", in.gate);
  DGATE_CHECK(in.src.size() == in.dest.size(), "dest: expected ", in.src.size(), " tensors like src, got ",
              in.dest.size());
  const auto scalar = [&](const char* name, const std::optional<Tensor>& tensor) {
    if (tensor) check_tensor(name, *tensor, {}, ScalarType::Int, place);
  };
  scalar("count", in.count);
  scalar("waiting", in.waiting);
  scalar("bucket", in.bucket);
  scalar("status", in.status);
  const int64_t bucket_count = in.buckets ? length(*in.buckets) : 0;
  if (in.buckets) check_tensor("buckets", *in.buckets, {bucket_count}, ScalarType::Int, place);
  DGATE_CHECK(!in.buckets || bucket_count > 0, "buckets: expected at least one size, got none");
  DGATE_CHECK(in.buckets || !(in.bucket || in.handles), "buckets: expected sizes to choose from, got none");
  if (in.handles) check_tensor("handles", *in.handles, {gates}, ScalarType::Long, place);
  CheckedRoute checked{};
  for (size_t i = 0; i < in.src.size(); ++i) {
    checked.carried.push_back(match_rows(i, in.src[i], in.dest[i], rows, capacity, place));
  }
  check_separate(in);

  const auto pointer = [](const std::optional<Tensor>& tensor) {
    return tensor ? tensor->const_data_ptr<int32_t>() : nullptr;
  };
  const auto target = [](const std::optional<Tensor>& tensor) {
    return tensor ? tensor->mutable_data_ptr<int32_t>() : nullptr;
  };
  Route& route = checked.route;
  route.rows = rows;
  route.ids = reading<int64_t>(in.ids);
  route.margin = reading<float>(in.margin);
  route.label = reading<int64_t>(in.label);
  route.count = pointer(in.count);
  route.threshold = &reading<float>(in.thresholds)[in.gate];
  route.gate = in.gate;
  route.capacity = capacity;
  route.dest_ids = writing<int64_t>(in.dest_ids);
  route.dest_count = in.dest_count.mutable_data_ptr<int32_t>();
  route.waiting = pointer(in.waiting);
  route.samples = samples;
  route.out_labels = writing<int64_t>(in.out_labels);
  route.out_scores = writing<float>(in.out_scores);
  route.out_exits = writing<int64_t>(in.out_exits);
  route.bucket_count = bucket_count;
  if (in.buckets) route.buckets = reading<int32_t>(*in.buckets);
  route.bucket = target(in.bucket);
  route.handle = in.handles ? &reading<int64_t>(*in.handles)[in.gate] : nullptr;
  route.status = target(in.status);
  return checked;
}

}  // namespace dgate_rt
