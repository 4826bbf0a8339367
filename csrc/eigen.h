// What the CPU and CUDA kernels of EigenAdam share: the parts of a gradient, Adam's rule on one coordinate, and the
// control of the step length.
#pragma once

#include <cmath>
#include <cstdint>

#include "formulas.h"

namespace secondorder {

// The parts of a gradient G [n, p] (and g [n] of a bias) in the bases U [n, ku] of its rows and V [p, kv] of its
// columns. With G' = G - g a^T, X = [G' V, g] and c = kv + 1 columns (without a bias G' = G, X = G V, c = kv):
//
//   C = U^T X                     [ku, c]
//   R = X - U C                   [n, c]     where ku < n
//   T = U^T G' (I - V V^T)        [ku, p]    where kv < p
//   E = (I - U U^T) G' (I - V V^T)  [n, p]   where both
//
// A tensor of all parts is flat: C, R, T, E one after another, each row-major.
struct EigenSizes {
  int64_t n, p, ku, kv;
  bool bias;

  SECONDORDER_HD int64_t c() const { return kv + (bias ? 1 : 0); }
  SECONDORDER_HD int64_t corner() const { return ku * c(); }
  SECONDORDER_HD int64_t right() const { return ku < n ? n * c() : 0; }
  SECONDORDER_HD int64_t top() const { return kv < p ? ku * p : 0; }
  SECONDORDER_HD int64_t residual() const { return ku < n && kv < p ? n * p : 0; }
  SECONDORDER_HD int64_t rest() const { return corner() + right() + top(); }
  SECONDORDER_HD int64_t parts() const { return rest() + residual(); }
  // Whether every element stands for itself: there is no basis.
  SECONDORDER_HD bool apart() const { return ku == 0 && kv == 0; }
};

// The row of E that is the s-th of `rows` sampled ones.
SECONDORDER_HD int64_t eigen_sampled_row(int64_t s, int64_t rows, int64_t n) { return s * n / rows; }

// The coefficients of m and x in Adam's rule below, t from 0.
struct EigenCorrections {
  double first, fresh;

  SECONDORDER_HD EigenCorrections(double b1, double b2, int64_t t) {
    const double root = std::sqrt(1 - std::pow(b2, double(t + 1)));
    first = root * b1 / (1 - std::pow(b1, double(t + 2)));
    fresh = root * (1 - b1) / (1 - std::pow(b1, double(t + 1)));
  }
};

// Adam's rule with Nesterov's look-ahead, as in NAdam, t from 0:
//
//   m = beta1 m + (1 - beta1) x,   v = beta2 v + (1 - beta2) x^2
//   N = clip(sqrt(1 - beta2^(t+1)) (beta1 m / (1 - beta1^(t+2)) + (1 - beta1) x / (1 - beta1^(t+1))) / (sqrt(v) + eps),
//   +-1.2)
//
// Where elements stand for themselves (`lazy`), one whose gradient is zero keeps its moments: a row of an embedding
// waits until it is looked up again.
template <typename T>
struct EigenMoments {
  T beta1, beta2, first, fresh, eps;
  bool lazy;
  static constexpr double kClip = 1.2;

  SECONDORDER_HD EigenMoments(double b1, double b2, double first_, double fresh_, double eps_, bool lazy_)
      : beta1(T(b1)), beta2(T(b2)), first(T(first_)), fresh(T(fresh_)), eps(T(eps_)), lazy(lazy_) {}

  // Whether the coordinate waits: its moments, its value and its last step stay.
  SECONDORDER_HD bool waits(T x) const { return lazy && x == T(0); }

  // Takes x into both moments of its coordinate; returns N.
  SECONDORDER_HD T normed(T x, T& m, T& v) const {
    if (waits(x)) return T(0);
    m = beta1 * m + (T(1) - beta1) * x;
    v = beta2 * v + (T(1) - beta2) * x * x;
    const T ratio = (first * m + fresh * x) / (std::sqrt(v) + eps), clip = T(kClip);
    return ratio > clip ? clip : ratio < -clip ? -clip : ratio;
  }
};

// Entries of the control tensor (float64): what finds the step length.
enum EigenControl : int64_t {
  kEigenLength,        // L
  kEigenOscillations,  // K, the steps whose fresh slope along the last step was negative
  kEigenSlope,         // S0, the average slope along the present step
  kEigenLastSlope,     // S1, the average slope along the step before
  kEigenSteps,         // steps taken
  kEigenRefused,       // steps refused since a gradient was not finite: nothing was changed by them
  kEigenUnrenewed,     // 1 where the renewal of this step was refused: then the step will be, too
  kEigenFirstSlope,    // the slope along the first step, until the length has proved to be short enough: then 0
  kEigenControl
};

// When what a call was told holds: always with every = 0; else when `control` had `since` steps. A replay of the CUDA
// graph that has captured the call takes the steps from `control`, and renews bases at every so-many-th of them.
struct EigenReplay {
  int64_t every = 0, since = 0;

  // The steps since then.
  SECONDORDER_HD int64_t steps(const double* control) const { return every ? now(control) - since : 0; }

  // Whether no bases are to be renewed.
  SECONDORDER_HD bool idle(const double* control) const { return every && now(control) % every != 0; }

  // w = (1 - decay) / (1 - decay^r) at the r-th renewal, from the w of then.
  SECONDORDER_HD double share(const double* control, double then, double decay) const {
    if (!every) return then;
    const int64_t renewals = due(now(control)) - due(since);
    return (1 - decay) / (1 - (1 - (1 - decay) / then) * std::pow(decay, double(renewals)));
  }

 private:
  static SECONDORDER_HD int64_t now(const double* control) { return int64_t(control[kEigenSteps]); }
  // How many of the first t steps renew bases.
  SECONDORDER_HD int64_t due(int64_t t) const { return (t + every - 1) / every; }
};

constexpr double kEigenWarmUp = 14, kEigenRate = 0.2, kEigenEta = 0.05, kEigenZone = 0.1, kEigenBrake = 0.6,
                 kEigenDecay = 25, kEigenStart = 0.01, kEigenTooLong = 0.7, kEigenShortest = 1e-6, kEigenLongest = 0.1;

// The step length, without lr: L / sqrt(1 + K / 25), rising over the first 14 steps.
SECONDORDER_HD double eigen_length(const double* control) {
  const double rise = (control[kEigenSteps] + 2) / kEigenWarmUp;
  return control[kEigenLength] / std::sqrt(1 + control[kEigenOscillations] / kEigenDecay) * (rise < 1 ? rise : 1.0);
}

// Whether it can multiply a step length.
SECONDORDER_HD bool eigen_is_rate(double x) { return x >= 0 && x - x == 0; }

// While the length rises: shortens it where the gradients after steps point back or grow, so that steps were too long
// from the start. A step that points along the next batch's gradient takes back one shortening, or ends all of it where
// there is none. Where gradients are noise, such a step comes soon, or slopes fall with the loss.
SECONDORDER_HD void eigen_brake(double* control, double s1) {
  double &first = control[kEigenFirstSlope], &length = control[kEigenLength];
  if (first <= 0) return;
  if (s1 > kEigenZone * control[kEigenSlope]) {
    length = length / kEigenTooLong < kEigenStart ? length / kEigenTooLong : kEigenStart;
    if (length == kEigenStart) first = 0;
  } else if (control[kEigenLastSlope] < 0 || control[kEigenSlope] > first) {
    length *= kEigenTooLong;
  }
}

// After a step: s0 = <x_t, N_t>, s1 = <x_t, N_{t-1}>, summed over all coordinates; s1 is unknown where bases were
// renewed.
SECONDORDER_HD void eigen_control(double* control, double s0, double s1, bool renewed) {
  const double t = control[kEigenSteps];
  control[kEigenSteps] = t + 1;
  if (t == 0) {
    control[kEigenSlope] = control[kEigenFirstSlope] = s0;
  } else {
    control[kEigenSlope] += kEigenRate * (s0 - control[kEigenSlope]);
    if (!renewed) {
      control[kEigenLastSlope] += kEigenRate * (s1 - control[kEigenLastSlope]);
      if (s1 < 0) control[kEigenOscillations] += 1;
      if (t <= kEigenWarmUp) eigen_brake(control, s1);
    }
  }
  const double slope = std::fabs(control[kEigenSlope]);
  if (t <= kEigenWarmUp || slope == 0) return;
  const double r = control[kEigenLastSlope] / slope;
  double change = 0;
  if (r > kEigenZone && control[kEigenOscillations] < kEigenDecay) change = r - kEigenZone;
  if (r < -kEigenBrake) change = r + kEigenBrake;
  change = change > 1 ? 1 : change < -1 ? -1 : change;
  const double length = control[kEigenLength] * std::exp(kEigenEta * change);
  control[kEigenLength] = length < kEigenShortest ? kEigenShortest : length > kEigenLongest ? kEigenLongest : length;
}

// A direction for a basis whose own was lost: the j-th entry of the q-th, in [-1, 1).
SECONDORDER_HD double eigen_refill(int64_t j, int64_t q) {
  uint32_t u = uint32_t(j) * 2654435761u + uint32_t(q) * 40503u + 12345u;
  u ^= u >> 15;
  u *= 2246822519u;
  u ^= u >> 13;
  return double(u) / 2147483648.0 - 1;
}

}  // namespace secondorder
