// The CPU operators. Shapes, types and meaning are those of dgate_rt/ops.py.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common.h"

namespace dgate_rt {

std::tuple<Tensor, Tensor> gate_score(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                      const std::string& pool, const std::optional<Tensor>& count);

std::tuple<Tensor, Tensor, Tensor> gate_distances(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                                  const std::string& pool, const std::optional<Tensor>& count);

void route_(const std::vector<Tensor>& src, const Tensor& ids, const Tensor& margin, const Tensor& label,
            const std::optional<Tensor>& count, const Tensor& thresholds, int64_t gate, const std::vector<Tensor>& dest,
            const Tensor& dest_ids, const Tensor& dest_count, const Tensor& out_labels, const Tensor& out_scores,
            const Tensor& out_exits, bool append);

}  // namespace dgate_rt
