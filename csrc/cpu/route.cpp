// route_ on the CPU: verdicts first, so that a refusal writes nothing; then results; then the survivors' rows, which
// are nearly all of the work, on all threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "checks.h"
#include "operators.h"

namespace dgate_rt {
namespace {

constexpr int64_t kGrain = int64_t{1} << 16;  // bytes that are worth a thread

// A 1-D tensor at any stride.
template <class T>
struct Vector {
  T* data;
  int64_t stride;
  T& operator[](int64_t index) const { return data[index * stride]; }
};

template <class T>
Vector<const T> reading(const Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.stride(0)};
}

template <class T>
Vector<T> writing(const Tensor& tensor) {
  return {tensor.mutable_data_ptr<T>(), tensor.stride(0)};
}

int64_t row_elements(const Tensor& rows) {
  int64_t elements = 1;
  for (int64_t dim = 1; dim < rows.dim(); ++dim) elements *= rows.size(dim);
  return elements;
}

// Whether a row occupies one run of memory, in whatever order of its dimensions.
bool dense_rows(const Tensor& rows) {
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

bool same_rows(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim() || a.scalar_type() != b.scalar_type()) return false;
  for (int64_t dim = 1; dim < a.dim(); ++dim) {
    if (a.size(dim) != b.size(dim)) return false;
  }
  return true;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t dim = 1; dim < a.dim(); ++dim) {
    if (a.size(dim) != 1 && a.stride(dim) != b.stride(dim)) return false;
  }
  return true;
}

std::string strides_of_rows(const Tensor& rows) {
  std::ostringstream text;
  text << '(';
  for (int64_t dim = 1; dim < rows.dim(); ++dim) text << (dim > 1 ? ", " : "") << rows.stride(dim);
  text << ')';
  return text.str();
}

// One tensor that survivors carry on: rows of bytes from src to dest.
struct Rows {
  const char* src;
  char* dest;
  int64_t src_stride, dest_stride;  // bytes from row to row
  int64_t bytes;                    // of a row
  int64_t src_end, dest_end;        // bytes that all rows span; 0 where nothing is to be copied
};

Rows match_rows(size_t index, const Tensor& src, const Tensor& dest, int64_t rows, int64_t capacity) {
  DGATE_CHECK(src.is_cpu() && src.dim() > 0 && src.size(0) == rows, "src[", index, "]: expected ", rows,
              " rows on cpu, got ", describe(src));
  DGATE_CHECK(dest.is_cpu() && same_rows(src, dest) && dest.size(0) == capacity, "dest[", index, "]: expected ",
              capacity, " rows on cpu like those of src[", index, "] ", describe(src), ", got ", describe(dest));
  const int64_t element = static_cast<int64_t>(src.element_size());
  Rows matched{static_cast<const char*>(src.const_data_ptr()),
               static_cast<char*>(dest.mutable_data_ptr()),
               src.stride(0) * element,
               dest.stride(0) * element,
               row_elements(src) * element,
               0,
               0};
  if (matched.bytes == 0 || rows == 0 || capacity == 0) return matched;  // strides of an empty tensor mean nothing
  DGATE_CHECK(dense_rows(src), "src[", index, "]: expected each row in one run of memory, got strides ",
              strides_of_rows(src), " for ", describe(src));
  DGATE_CHECK(same_strides(src, dest), "dest[", index, "]: expected rows with strides ", strides_of_rows(src),
              " like those of src[", index, "], got ", strides_of_rows(dest));
  DGATE_CHECK(capacity < 2 || matched.dest_stride >= matched.bytes, "dest[", index,
              "]: expected rows that do not overlap, got a stride of ", dest.stride(0));
  matched.src_end = (rows - 1) * matched.src_stride + matched.bytes;
  matched.dest_end = (capacity - 1) * matched.dest_stride + matched.bytes;
  return matched;
}

// Copies source rows `keep` to destination rows start, start + 1, ...
void copy_rows(const Rows& rows, const std::vector<int64_t>& keep, int64_t start) {
  if (rows.bytes == 0) return;
  const int64_t bytes = rows.bytes, total = static_cast<int64_t>(keep.size()) * bytes;
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t rank = begin / bytes, offset = begin % bytes;
      const int64_t length = std::min(bytes - offset, end - begin);
      std::memcpy(rows.dest + (start + rank) * rows.dest_stride + offset,
                  rows.src + keep[static_cast<size_t>(rank)] * rows.src_stride + offset, static_cast<size_t>(length));
      begin += length;
    }
  });
}

}  // namespace

void route_(const std::vector<Tensor>& src, const Tensor& ids, const Tensor& margin, const Tensor& label,
            const std::optional<Tensor>& count, const Tensor& thresholds, int64_t gate, const std::vector<Tensor>& dest,
            const Tensor& dest_ids, const Tensor& dest_count, const Tensor& out_labels, const Tensor& out_scores,
            const Tensor& out_exits, bool append) {
  const auto length = [](const Tensor& vector) { return vector.dim() == 1 ? vector.size(0) : 0; };
  const int64_t rows = length(ids), capacity = length(dest_ids), samples = length(out_labels);
  const int64_t gates = length(thresholds);
  check_tensor("ids", ids, {rows}, ScalarType::Long);
  check_tensor("margin", margin, {rows}, ScalarType::Float);
  check_tensor("label", label, {rows}, ScalarType::Long);
  check_tensor("thresholds", thresholds, {gates}, ScalarType::Float);
  check_tensor("dest_ids", dest_ids, {capacity}, ScalarType::Long);
  check_tensor("dest_count", dest_count, {}, ScalarType::Int);
  check_tensor("out_labels", out_labels, {samples}, ScalarType::Long);
  check_tensor("out_scores", out_scores, {samples}, ScalarType::Float);
  check_tensor("out_exits", out_exits, {samples}, ScalarType::Long);
  DGATE_CHECK(0 <= gate && gate < gates, "gate: expected 0 to ", gates - 1, ", got ", gate);
  DGATE_CHECK(src.size() == dest.size(), "dest: expected ", src.size(), " tensors like src, got ", dest.size());
  const int64_t live = live_rows(count, rows);
  const int64_t start = append ? *dest_count.const_data_ptr<int32_t>() : 0;
  DGATE_CHECK(0 <= start && start <= capacity, "dest_count: expected 0 to ", capacity, ", got ", start);

  std::vector<Rows> carried;
  for (size_t i = 0; i < src.size(); ++i) carried.push_back(match_rows(i, src[i], dest[i], rows, capacity));
  for (const Rows& to : carried) {
    for (const Rows& from : carried) {
      DGATE_CHECK(to.dest + to.dest_end <= from.src || from.src + from.src_end <= to.dest,
                  "dest: expected memory of its own, got some that src uses");
    }
  }

  const auto id = reading<int64_t>(ids), verdict = reading<int64_t>(label);
  const auto score = reading<float>(margin);
  const float threshold = reading<float>(thresholds)[gate];
  std::vector<int64_t> keep;
  keep.reserve(static_cast<size_t>(live));
  for (int64_t row = 0; row < live; ++row) {
    DGATE_CHECK(0 <= id[row] && id[row] < samples, "ids: expected 0 to ", samples - 1, ", got ", id[row], " in row ",
                row);
    if (!(score[row] >= threshold && std::isfinite(score[row]))) keep.push_back(row);
  }
  const int64_t survivors = static_cast<int64_t>(keep.size());
  DGATE_CHECK(start + survivors <= capacity, "dest: ", start, " rows wait and ", survivors,
              " survive, more than its capacity of ", capacity);

  const auto out_label = writing<int64_t>(out_labels), out_exit = writing<int64_t>(out_exits);
  const auto out_score = writing<float>(out_scores);
  const auto dest_id = writing<int64_t>(dest_ids);
  int64_t rank = 0;
  for (int64_t row = 0; row < live; ++row) {
    if (rank < survivors && keep[static_cast<size_t>(rank)] == row) {
      dest_id[start + rank++] = id[row];
    } else {
      out_label[id[row]] = verdict[row];
      out_score[id[row]] = score[row];
      out_exit[id[row]] = gate;
    }
  }
  for (const Rows& tensor : carried) copy_rows(tensor, keep, start);
  *dest_count.mutable_data_ptr<int32_t>() = static_cast<int32_t>(start + survivors);
}

}  // namespace dgate_rt
