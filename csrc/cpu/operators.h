// The CPU operators. Shapes, types and meaning are those of dgate_rt/ops.py.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../route_tensors.h"

namespace dgate_rt {

std::tuple<Tensor, Tensor> gate_score(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                      const std::string& pool, const std::optional<Tensor>& count,
                                      const std::string& criterion);

std::tuple<Tensor, Tensor, Tensor> gate_distances(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                                  const std::string& pool, const std::optional<Tensor>& count,
                                                  const std::string& criterion);

void route_on_cpu(const RouteTensors& tensors);

}  // namespace dgate_rt
