#pragma once

#include <cmath>
#include <type_traits>

#include "../formulas.h"
#include "launch.cuh"

namespace secondorder::cuda {

// The transcendental functions e0, e1 that an activation's derivatives take (formulas.h).
template <typename Formula, typename T>
__device__ __forceinline__ void transcendentals(Formula, T v, T p, T& e0, T& e1) {
  e0 = e1 = T(0);
  if constexpr (std::is_same_v<Formula, Softplus>) e0 = T(1) / (T(1) + std::exp(-p * v));
  if constexpr (std::is_same_v<Formula, Silu>) e0 = T(1) / (T(1) + std::exp(-v));
  if constexpr (std::is_same_v<Formula, Gelu>) {
    e0 = std::erf(T(0.70710678118654752440) * v);
    e1 = std::exp(T(-0.5) * v * v);
  }
  if constexpr (std::is_same_v<Formula, GeluTanh>) {
    const T y = T(0.79788456080286535588) * v * (T(1) + T(0.044715) * v * v);
    e0 = T(1) / (T(1) + std::exp(T(2) * std::abs(y)));
  }
}

// sigma' and sigma'' at one element. The activation is the same for a whole launch: a branch, but never a divergent
// one.
template <typename T>
__device__ __forceinline__ void derivatives(Activation activation, T v, T p, T& d1, T& d2) {
  with_activation(activation, [&](auto formula) {
    T e0, e1;
    transcendentals(formula, v, p, e0, e1);
    formula.derivatives(v, e0, e1, p, d1, d2);
  });
}

}  // namespace secondorder::cuda
