// The launchers: what the glue calls. Each takes raw device pointers to contiguous arrays, their sizes and a stream,
// for T = float or double, enqueues its kernels and returns; the caller checks the launch. Nothing here waits for the
// device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../eigen.h"
#include "../formulas.h"

typedef struct CUstream_st* cudaStream_t;  // as the CUDA headers have it; those are not needed here

namespace secondorder::cuda {

// What a launcher must know of the device to choose its launch.
struct Device {
  int multiprocessors;
  int shared_bytes;  // the most that one block may ask for (cudaDevAttrMaxSharedMemoryPerBlockOptin)
};

// Whether the binary has kernels that the current device can run.
bool has_kernels();

// saved, d1, d2 [n]
template <typename T>
void activation_derivatives(int64_t n, const T* saved, Activation activation, T parameter, T* d1, T* d2,
                            cudaStream_t stream);

// Where d1 and d2 come from: given as such, or computed from what autograd saved of the activation.
template <typename T>
struct Derivatives {
  const T* first;       // [m, n]: d1, or `saved` with `analytic`
  const T* second;      // [m, n]: d2, null without the diagonal or with `analytic`
  const T* grad_input;  // [m, n], or null: no diagonal
  bool analytic;
  Activation activation;
  T parameter;
};

// How products of float32 matrices are computed; float64's are always plain.
enum class Arithmetic {
  plain,       // multiply-adds
  split_tf32,  // tensor cores, three products for one of float32's accuracy
  tf32,        // tensor cores, the operands rounded to 11 significant bits
};

// The bytes of workspace, 16-byte aligned, that bias_hessian needs.
template <typename T>
size_t bias_hessian_workspace(int64_t k, int64_t n, int64_t m, Arithmetic arithmetic, const Device& device);

// hessian [k, k] symmetric, weight [k, n], out [n, n]; m > 0
template <typename T>
void bias_hessian(int64_t k, int64_t n, int64_t m, const T* hessian, const T* weight, const Derivatives<T>& derivatives,
                  T gamma, Arithmetic arithmetic, void* workspace, T* out, const Device& device, cudaStream_t stream);

// The same from products computed elsewhere, of which the lower triangles are read: curvature = W^T H W and
// moment = d1^T d1 [n, n], and sums = sum_i d2_i * grad_input_i [n], or null: no diagonal.
template <typename T>
void bias_hessian_of_products(int64_t n, int64_t m, const T* curvature, const T* moment, const double* sums, T gamma,
                              T* out, cudaStream_t stream);

// One layer of an EA-CG solve. n_out or n_in may be 0.
template <typename T>
struct EacgLayer {
  int64_t n_out, n_in;
  const T* bias_hessian;  // [n_out, n_out]
  const T* mean_input;    // [n_in]
  const T* grad_weight;   // [n_out, n_in]
  const T* grad_bias;     // [n_out], or null: no bias
  T* weight;              // [n_out, n_in]: the parameter, or where the direction goes
  T* bias;                // [n_out], or null
  T* weight_momentum;     // [n_out, n_in], or null
  T* bias_momentum;       // [n_out], or null
  int64_t* iterations;    // [1]
  double alpha, lr, momentum, weight_decay;
  double max_norm;  // of [P, d], which is shortened where it is longer; infinity: never
};

struct EacgSettings {
  int max_iter;
  double tol;
  bool truncated;
};

// The bytes of workspace, 16-byte aligned, that the two launchers below share.
template <typename T>
size_t eacg_workspace(const EacgLayer<T>* layers, int count, const Device& device);

// The directions of all layers, in factored form in the workspace, and each layer's iterations. not_finite [1] (or
// null) is set to 1 where a layer's direction, or an update or momentum along it, would not be finite, and that layer's
// iterations to -1.
template <typename T>
void eacg_directions(const EacgLayer<T>* layers, int count, const EacgSettings& settings, void* workspace,
                     int* not_finite, const Device& device, cudaStream_t stream);

// weight, bias = the directions.
template <typename T>
void eacg_write(const EacgLayer<T>* layers, int count, void* workspace, const Device& device, cudaStream_t stream);

// weight, bias += lr * (direction, through the momentum where there is one), with weight decay; nothing where
// *not_finite.
template <typename T>
void eacg_update(const EacgLayer<T>* layers, int count, void* workspace, const int* not_finite, const Device& device,
                 cudaStream_t stream);

// One layer of K-BFGS. What a launcher does not name may be null.
template <typename T>
struct BfgsLayer {
  int64_t n;
  T* inverse_hessian;  // [n, n] symmetric
  const T* s;          // [n]
  const T* y;          // [n]
  T* damped_s;         // [n]
  T* damped_y;         // [n]
  int64_t* status;     // [1] bits: 1 updated, 2 s was damped, 4 y was damped
  double mu1, mu2;
  bool damped, bounded;
  const T* matrix;  // [n, n] symmetric
  double damping;
  T* hy;         // [n] H y
  const T* hs;   // [n] H s
  const T* hhy;  // [n] H H y
  T* s_pairs;    // [pairs, n]
  T* y_pairs;    // [pairs, n]
  int64_t pairs;
};

// The bytes of workspace, 16-byte aligned, that any of the launchers below needs.
template <typename T>
size_t bfgs_workspace(const BfgsLayer<T>* layers, int count);

// damped_s, damped_y = the double damping of s, y.
template <typename T>
void double_damping(const BfgsLayer<T>* layers, int count, void* workspace, cudaStream_t stream);

// inverse_hessian = its BFGS update by (s, y). It stays as it is where s.y is not positive, where it turns out
// indefinite, and where a number would not be finite. Writes status, as do all below.
template <typename T>
void bfgs_update(const BfgsLayer<T>* layers, int count, void* workspace, cudaStream_t stream);

// Both in two passes over each inverse Hessian, one that reads it and one that updates it; where both thetas are below
// 1, a third reads it once more. Where not `damped`, both thetas are 1; where `bounded`, the inverse Hessian also stays
// as it is unless y^T H y <= s.y / mu1 and s.s <= s.y / mu2 of the damped pair.
template <typename T>
void damped_bfgs_update(const BfgsLayer<T>* layers, int count, void* workspace, cudaStream_t stream);

// inverse_hessian = its BFGS update by H s and (matrix + damping I) H s: three passes over it, one over the matrix.
template <typename T>
void hessian_action_update(const BfgsLayer<T>* layers, int count, void* workspace, cudaStream_t stream);

// The double damping of s, y, with H y given as hy, appended to s_pairs and y_pairs, whose first rows go. They stay as
// they are where the curvature is not positive and where a number would not be finite. `damped` and `bounded` as above;
// where both, H s and H H y are given as hs and hhy.
template <typename T>
void damped_lbfgs_update(const BfgsLayer<T>* layers, int count, void* workspace, cudaStream_t stream);

// The middle of L-BFGS's compact product, with R = triu(S Y^T), D = diag(S Y^T) and columns = [S; Y] V:
// columns = [[R^-T (D + Y Y^T) R^-1, -R^-T], [-R^-1, 0]] columns. A zero on D is an empty place of the memory.
//   sy = S Y^T, ys = Y S^T, yy = Y Y^T [p, p]; columns [2p, k]; work [k, 2p]
template <typename T>
void lbfgs_middle(int64_t p, int64_t k, const double* sy, const double* ys, const double* yy, T* columns, double* work,
                  cudaStream_t stream);

// A matrix of a net in the operators of EigenAdam, which secondorder/ops/eigen.py explains.
template <typename T>
struct EigenMatrix {
  EigenSizes sizes;
  const T* grad_weight;  // [n, p]
  const T* grad_bias;    // [n], or null: no bias
  const T* mean;         // [p], or null: no bias
  const T* basis_out;    // [ku, n]
  const T* basis_in;     // [kv, p]
  T* first;              // [parts]
};

template <typename T>
struct EigenStep : EigenMatrix<T> {
  T* weight;        // [n, p]
  T* bias;          // [n], or null
  T* second;        // [parts]
  T* last;          // [rest + sampled p]
  int64_t sampled;  // rows of E that stand for all; 0 without E
  double* size;     // [1]
  int64_t step;     // t, the steps made
  double beta1, beta2, eps;
  double lr, lr_bias, decay, decay_bias;
  const double* rate;  // [2] what multiplies lr and lr_bias, or null
};

template <typename T>
struct EigenRenewal : EigenMatrix<T> {
  T* new_mean;            // [p], or null; like the two after it an array of EigenMatrix, to be written
  T* new_out;             // [ku, n]
  T* new_in;              // [kv, p]
  T* scale_out;           // [ku]
  T* scale_in;            // [kv]
  const T* sketch;        // [kv + 1, p], or null: no inputs were seen
  int64_t rows;           // that the sketch has seen
  const T* bias_hessian;  // [n, n], or null: U is of the gradient
  double share;
};

template <typename T>
struct EigenSketch {
  int64_t m, p, k;
  const T* inputs;  // [m, p]
  const T* basis;   // [k, p]
  const T* shift;   // [p], or null: none
  T* sketch;        // [k + 1, p]
};

// `replay` of the launchers below says when what they are told holds; `control` [kEigenControl] has the steps.

// The bytes of workspace, 16-byte aligned, of each of the launchers below.
template <typename T>
size_t eigen_sketch_workspace(const EigenSketch<T>& sketch, const Device& device);
template <typename T>
size_t eigen_renew_workspace(const EigenRenewal<T>* matrices, int count, const Device& device);
template <typename T>
size_t eigen_step_workspace(const EigenStep<T>* matrices, int count, const Device& device);

// sketch += (x V, 1)^T x over the rows x of inputs - shift; m, p > 0. control may be null where `replay` asks nothing.
template <typename T>
void eigen_sketch(const EigenSketch<T>& sketch, const double* control, const EigenReplay& replay, void* workspace,
                  const Device& device, cudaStream_t stream);

// Renews means, bases and scales, and turns the first moments with the bases; count > 0. Where a gradient, a sketch
// or a bias Hessian is not finite it changes control alone. decay: of the averages, from one renewal to the next.
template <typename T>
void eigen_renew(const EigenRenewal<T>* matrices, int count, double* control, const EigenReplay& replay, double decay,
                 void* workspace, const Device& device, cudaStream_t stream);

// The step of all matrices, then control's; a refused one changes control alone.
template <typename T>
void eigen_step(const EigenStep<T>* matrices, int count, double* control, bool renewed, const EigenReplay& replay,
                void* workspace, const Device& device, cudaStream_t stream);

}  // namespace secondorder::cuda
