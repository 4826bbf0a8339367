// Scalar formulas shared by the CPU and CUDA kernels: each is written once, here.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define SECONDORDER_HD __host__ __device__ __forceinline__
#else
#define SECONDORDER_HD inline
#endif

namespace secondorder {

// Pos-Eig of one eigenvalue (Chen et al., Eq. 8): a negative one becomes gamma * eigenvalue, gamma <= 0. NaN stays NaN.
template <typename T>
SECONDORDER_HD T pos_eig(T eigenvalue, T gamma) {
  return eigenvalue < T(0) ? gamma * eigenvalue : eigenvalue;
}

// The analytic activations. Each struct gives sigma' (d1) and sigma'' (d2) at one element from
//   v       what autograd saves for it: the output h where that determines the derivatives, else the preactivation z
//   e0, e1  its transcendental functions of v, as `transcendentals` names them (unused ones may be anything)
//   p       its parameter (slope, beta, alpha; else unused)
// The piecewise ones take the derivatives of torch's backward at the kink: sigma'(0) = 0 for ReLU, the slope for leaky
// ReLU.
enum class Activation { identity, sigmoid, tanh, relu, leaky_relu, elu, softplus, silu, gelu, gelu_tanh };

struct Identity {
  template <typename T>
  static SECONDORDER_HD void derivatives(T, T, T, T, T& d1, T& d2) {
    d1 = T(1);
    d2 = T(0);
  }
};

struct Sigmoid {  // v = h
  template <typename T>
  static SECONDORDER_HD void derivatives(T h, T, T, T, T& d1, T& d2) {
    d1 = h * (T(1) - h);
    d2 = d1 * (T(1) - h - h);
  }
};

struct Tanh {  // v = h
  template <typename T>
  static SECONDORDER_HD void derivatives(T h, T, T, T, T& d1, T& d2) {
    d1 = (T(1) - h) * (T(1) + h);
    d2 = T(-2) * h * d1;
  }
};

struct Relu {  // v = h
  template <typename T>
  static SECONDORDER_HD void derivatives(T h, T, T, T, T& d1, T& d2) {
    d1 = h > T(0) ? T(1) : T(0);
    d2 = T(0);
  }
};

struct LeakyRelu {  // v = h, p = slope > 0
  template <typename T>
  static SECONDORDER_HD void derivatives(T h, T, T, T slope, T& d1, T& d2) {
    d1 = h > T(0) ? T(1) : slope;
    d2 = T(0);
  }
};

struct Elu {  // v = h = z or alpha (e^z - 1), p = alpha > 0
  template <typename T>
  static SECONDORDER_HD void derivatives(T h, T, T, T alpha, T& d1, T& d2) {
    d1 = h > T(0) ? T(1) : h + alpha;
    d2 = h > T(0) ? T(0) : h + alpha;
  }
};

struct Softplus {  // v = z, e0 = sigmoid(beta z), p = beta; linear beyond beta z = 20, torch's default threshold
  template <typename T>
  static SECONDORDER_HD void derivatives(T z, T s, T, T beta, T& d1, T& d2) {
    const bool linear = beta * z > T(20);
    d1 = linear ? T(1) : s;
    d2 = linear ? T(0) : beta * s * (T(1) - s);
  }
};

// z, or +-1024 where it is further from 0: there the derivatives of SiLU and of both GELUs are their limits, in
// float64, too. Powers of a larger z overflow, and their product with what vanishes is NaN. NaN stays NaN.
template <typename T>
SECONDORDER_HD T before_limits(T z) {
  return z > T(1024) ? T(1024) : z < T(-1024) ? T(-1024) : z;
}

struct Silu {  // v = z, e0 = sigmoid(z)
  template <typename T>
  static SECONDORDER_HD void derivatives(T v, T s, T, T, T& d1, T& d2) {
    const T z = before_limits(v), ds = s * (T(1) - s);
    d1 = s + z * ds;
    d2 = ds * (T(2) + z * (T(1) - s - s));
  }
};

struct Gelu {  // v = z, e0 = erf(z / sqrt 2), e1 = exp(-z^2 / 2)
  template <typename T>
  static SECONDORDER_HD void derivatives(T v, T erf, T exp, T, T& d1, T& d2) {
    const T z = before_limits(v), phi = T(0.39894228040143267794) * exp;  // the normal density at z
    d1 = T(0.5) * (T(1) + erf) + z * phi;
    d2 = phi * (T(2) - z * z);
  }
};

struct GeluTanh {  // v = z, e0 = sigmoid(-2 |y|), y = sqrt(2/pi) (z + 0.044715 z^3): 1 - |tanh y| without cancellation
  template <typename T>
  static SECONDORDER_HD void derivatives(T v, T s, T, T, T& d1, T& d2) {
    const T z = before_limits(v);
    const T dy = T(0.79788456080286535588) * (T(1) + T(3 * 0.044715) * z * z);
    const T d2y = T(0.79788456080286535588 * 6 * 0.044715) * z;
    const T small = s + s, large = T(1) - small + T(1);  // 1 - |tanh y|, 1 + |tanh y|
    const T tanh = z < T(0) ? small - T(1) : T(1) - small;
    const T dt = small * large;
    d1 = T(0.5) * ((z < T(0) ? small : large) + z * dt * dy);
    d2 = dt * (dy + T(0.5) * z * (d2y - T(2) * tanh * dy * dy));
  }
};

// Calls f with the struct of one activation.
template <typename F>
SECONDORDER_HD void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::identity: return f(Identity{});
    case Activation::sigmoid: return f(Sigmoid{});
    case Activation::tanh: return f(Tanh{});
    case Activation::relu: return f(Relu{});
    case Activation::leaky_relu: return f(LeakyRelu{});
    case Activation::elu: return f(Elu{});
    case Activation::softplus: return f(Softplus{});
    case Activation::silu: return f(Silu{});
    case Activation::gelu: return f(Gelu{});
    case Activation::gelu_tanh: return f(GeluTanh{});
  }
}

// Powell's damping: the weight theta of the undamped vector that lifts the curvature s.y to mu times `reference`
// (y^T H y when s is damped, s^T s when y is) where it is below that. 1: nothing to damp.
SECONDORDER_HD double powell_theta(double curvature, double reference, double mu) {
  return curvature < mu * reference ? (1 - mu) * reference / (reference - curvature) : 1;
}

// Whether reference / curvature is at most 1 / mu; a damped pair, which lies on the bound, has it up to rounding. mu =
// 0: no bound.
SECONDORDER_HD bool within_bound(double curvature, double reference, double mu) {
  return mu * reference <= (1 + 1e-3) * curvature;
}

}  // namespace secondorder
