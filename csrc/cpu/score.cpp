// gate_score and gate_distances on the CPU: pool, multiply, pick; each pass runs on all threads.
#include <algorithm>
#include <memory>

#include "../checks.h"
#include "distances.h"
#include "operators.h"
#include "pool.h"

namespace dgate_rt {
namespace {

constexpr int64_t kScratch = int64_t{1} << 20;  // floats of pooled features held at a time: 4 MiB
constexpr int64_t kGrain = int64_t{1} << 15;    // elements that are worth a thread

Element element_of(const Tensor& features) {
  switch (features.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    default:
      fail("features: expected float32, bfloat16 or float16, got ", describe(features));
  }
}

// [N, C], [N, T, C] and [N, C, H, W] as channels x height x width.
Features view_features(const Tensor& features, const std::string& pool) {
  const int64_t rank = features.dim();
  const bool cls = pool == "cls", flat = pool == "flat";
  const int64_t side = pool == "avg" ? 1 : pool == "grid2" ? 2 : pool == "grid4" ? 4 : 0;
  DGATE_CHECK(side || cls || flat, "pool: expected 'avg', 'cls', 'flat', 'grid2' or 'grid4', got '", pool, "'");
  DGATE_CHECK(features.is_cpu(), "features: expected a tensor on cpu, got one on ", place_of(features));
  DGATE_CHECK(cls ? rank == 3 : 2 <= rank && rank <= 4, "features: pool='", pool, "' expects rank ",
              cls ? "3" : "2, 3 or 4", ", got ", describe(features));
  DGATE_CHECK(!cls || features.size(1) > 0, "features: pool='cls' expects at least one token, got ",
              describe(features));
  const bool map = rank == 4 && features.size(2) * features.size(3) != 1;
  const int64_t means = map ? side : rank > 2 ? std::min<int64_t>(side, 1) : 0;  // tokens and single elements: no grid
  Features view{features.const_data_ptr(), element_of(features), means, features.stride(0), {1, 1, 1}, {1, 1, 1}};
  const auto axis = [&](int to, int64_t from) {
    view.size[to] = features.size(from);
    view.stride[to] = features.stride(from);
  };
  if (view.side && rank == 3) {
    axis(0, 2);
    axis(2, 1);
  } else if (cls) {
    axis(2, 2);
  } else if (!view.side && features.is_contiguous()) {
    for (int64_t dim = 1; dim < rank; ++dim) view.size[2] *= features.size(dim);
  } else {
    for (int64_t dim = 1; dim < rank; ++dim) axis(static_cast<int>(3 - rank + dim), dim);
  }
  return view;
}

Criterion criterion_of(const std::string& name) {
  if (name == "margin") return Criterion::kMargin;
  if (name == "softmax") return Criterion::kSoftmax;
  DGATE_CHECK(name == "entropy", "criterion: expected 'margin', 'softmax' or 'entropy', got '", name, "'");
  return Criterion::kEntropy;
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Margin, label and distances of `rows` samples from `first` on; `scratch` holds their pooled features.
void score_rows(const Features& features, const Linear& gate, Criterion criterion, int64_t first, int64_t rows,
                float* scratch, float* distances, float* margin, int64_t* label) {
  const int64_t width = gate.width, classes = gate.classes;
  const float* pooled = scratch;
  int64_t pooled_stride = width;
  if (features.ready()) {
    pooled = static_cast<const float*>(features.data) + first * features.sample_stride;
    pooled_stride = features.sample_stride;
  } else {
    const int64_t units = features.units();
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, features.elements_per_unit()));
    torch::stable::parallel_for(0, rows * units, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t row = begin / units, start = begin % units;
        const int64_t stop = std::min(units, start + end - begin);
        pool(features, first + row, start, stop, scratch + row * width);
        begin += stop - start;
      }
    });
  }

  const int64_t blocks = (classes + kClassBlock - 1) / kClassBlock;
  const int64_t tiles = (rows + kTile - 1) / kTile;
  const int64_t work = kTile * std::max<int64_t>(1, width) * std::min(classes, kClassBlock);
  const int64_t grain = std::max<int64_t>(1, 16 * kGrain / work);
  torch::stable::parallel_for(0, tiles * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / blocks * kTile, k = item % blocks * kClassBlock;
      tile_distances(gate, pooled + row * pooled_stride, pooled_stride, std::min(kTile, rows - row), k,
                     std::min(classes, k + kClassBlock), distances + row * classes);
    }
  });

  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / classes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      confidence_and_label(distances + row * classes, classes, criterion, margin + row, label + row);
    }
  });
}

struct Scores {
  Tensor margin, label, distances;
};

Scores score(const Tensor& features, const Tensor& weight, const Tensor& bias, const std::string& pool,
             const std::optional<Tensor>& count, const std::string& criterion_name, bool keep_distances) {
  const Criterion criterion = criterion_of(criterion_name);
  const Features view = view_features(features, pool);
  const int64_t rows = features.size(0), width = view.width();
  const int64_t classes = weight.dim() == 2 ? weight.size(0) : 1;
  DGATE_CHECK(classes > 0, "weight: expected at least one class, got ", describe(weight));
  check_tensor("weight", weight, {classes, width}, ScalarType::Float);
  check_tensor("bias", bias, {classes}, ScalarType::Float);
  const int64_t live = live_rows(count, rows);

  Scores scores{torch::stable::new_zeros(features, {rows}, ScalarType::Float),
                torch::stable::new_zeros(features, {rows}, ScalarType::Long),
                torch::stable::new_zeros(features, {keep_distances ? rows : 0, classes}, ScalarType::Float)};
  float* margin = scores.margin.mutable_data_ptr<float>();
  int64_t* label = scores.label.mutable_data_ptr<int64_t>();
  float* kept = scores.distances.mutable_data_ptr<float>();
  const Tensor dense_weight = torch::stable::contiguous(weight), dense_bias = torch::stable::contiguous(bias);
  const Linear gate{dense_weight.const_data_ptr<float>(), dense_bias.const_data_ptr<float>(), classes, width};

  const int64_t pooled_width = view.ready() ? 0 : width;
  const int64_t step = std::min(live, round_up(kScratch / std::max(classes, pooled_width) + 1, kTile));
  const std::unique_ptr<float[]> pooled(new float[static_cast<size_t>(step * pooled_width)]);
  const std::unique_ptr<float[]> passing(new float[static_cast<size_t>(keep_distances ? 0 : step * classes)]);
  for (int64_t first = 0; first < live; first += step) {
    score_rows(view, gate, criterion, first, std::min(step, live - first), pooled.get(),
               keep_distances ? kept + first * classes : passing.get(), margin + first, label + first);
  }
  return scores;
}

}  // namespace

std::tuple<Tensor, Tensor> gate_score(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                      const std::string& pool, const std::optional<Tensor>& count,
                                      const std::string& criterion) {
  Scores scores = score(features, weight, bias, pool, count, criterion, false);
  return {scores.margin, scores.label};
}

std::tuple<Tensor, Tensor, Tensor> gate_distances(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                                  const std::string& pool, const std::optional<Tensor>& count,
                                                  const std::string& criterion) {
  Scores scores = score(features, weight, bias, pool, count, criterion, true);
  return {scores.margin, scores.label, scores.distances};
}

}  // namespace dgate_rt
