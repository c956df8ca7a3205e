// What a kernel is called with, and the table of kernels that every instruction set fills. No code here: this header
// is shared by all instruction sets and must not carry inline functions across them.
#pragma once

#include <cstddef>
#include <cstdint>

#define SB_INLINE inline __attribute__((always_inline))

namespace sparsebreg {

class ChunkStarts;

constexpr int LANES = 16;  // images (or samples) side by side in the lane layout, whatever the instruction set

// plain: row-major (N, C, H, W) or (N, features); lanes: [ceil(N/16)][C][H][W][16]; channels_last: (N, H, W, C).
enum class Layout : int { plain = 0, lanes = 1, channels_last = 2 };

// The nonzeros of a (rows x cols) matrix in CSR order and, where grad_x of a linear layer is wanted, in CSC order too.
// Validated by its owner.
struct Index {
  int64_t rows, cols, nnz;
  const int32_t* rowptr;      // rows + 1
  const int32_t* col;         // nnz, ascending inside a row
  const int32_t* colptr;      // cols + 1
  const int32_t* row;         // nnz, ascending inside a column
  const int32_t* csc_to_csr;  // nnz: places in CSR order
  const int32_t* csr_to_csc;  // nnz: and the other way
  ChunkStarts* row_chunks;    // of rows in ranges of columns
  ChunkStarts* col_chunks;    // of columns in ranges of rows
};

// y = x Wᵀ + b, W rows x cols. x (N, cols) and y (N, rows), row-major or in lanes [ceil(N/16)][features][16].
template <class T>
struct LinearArgs {
  Index index;
  int64_t N;
  const T* values;
  const T* bias;  // rows, or null
  const T* x;
  T* y;
  const T* grad_y;
  T* grad_x;       // null: not wanted
  T* grad_values;  // null: not wanted
  T* grad_bias;    // null: not wanted
  Layout x_layout, y_layout;
  int threads;
};

constexpr int GRAD_STRIP = 64;    // columns of a strip
constexpr int GRAD_SAMPLES = 64;  // samples of a block; a strip of so many floats has 16 KB
static_assert(GRAD_SAMPLES * GRAD_STRIP < 1 << 16, "places are of 16 bits");

// The gradient of a linear layer's weight as the product that it is, grad_yᵀ x (rows x cols): the nonzeros of grad_y,
// and x in strips of columns. See linear/weight_grad.h.
template <class T>
struct GradFactors {
  int64_t N, rows, cols;
  const T* strips;        // [ceil(cols / GRAD_STRIP)][N][GRAD_STRIP], zero beyond cols
  const int32_t* count;   // [ceil(N / GRAD_SAMPLES)][rows]: nonzeros of a row in a block of samples
  const uint16_t* place;  // [blocks][rows][GRAD_SAMPLES]: their samples inside of the block, times GRAD_STRIP
  const T* value;         // [blocks][rows][GRAD_SAMPLES]: the nonzeros; of both, only the first `count` are defined
};

// From grad_y (N, rows) and x (N, cols), row-major, to the arrays of GradFactors.
template <class T>
struct FactorArgs {
  int64_t N, rows, cols;
  const T* grad_y;
  const T* x;
  T* strips;
  int32_t* count;
  uint16_t* place;
  T* value;
  int threads;
};

template <class T>
struct NormArgs;

// x (N, IC, H, W), y (N, OC, OH, OW), index rows = OC, cols = IC / G * KH * KW.
template <class T>
struct ConvArgs {
  Index index;
  int64_t N;
  int IC, H, W, OC, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW, G;
  const T* values;
  const T* bias;
  const T* x;
  // Not null, in the lane layout: what is convolved is x_scale[c] * x + x_shift[c], rectified with x_relu.
  const T* x_scale;
  const T* x_shift;
  bool x_relu;
  T* y;
  T* mean;  // of y over samples and positions, and the biased variance; null: not wanted, else y is in the lane layout
  T* var;
  const T* grad_y;
  // Not null, in the lane layout: grad_y is the gradient not of y, but of what this norm makes of its x, which is y;
  // see norm_grad.
  const NormArgs<T>* y_norm;
  // Not null, with x_relu: the sums that norm_reduce takes for the norm of x, of mean x_mean.
  const T* x_mean;
  T* x_sum_g;
  T* x_sum_gx;
  T* grad_x;  // of what is convolved
  T* grad_values;
  T* grad_bias;
  Layout x_layout, y_layout;
  int threads;
};

template <class T>
struct PackArgs {
  int64_t N, C, P;  // plain (N, C, P) row-major; lanes [ceil(N/16)][C][P][16], padding lanes zero
  const T* src;
  T* dst;
  int threads;
};

// Where a step gathers the weights that it has moved: those at the places of an index go to values, as by gather_all.
template <class T>
struct GatherArgs {
  const Index* index;
  const uint64_t* marks;
  T* values;
};

// A step of LinBreg on n weights, or of ProxSGD, which has neither v nor delta. l1_shift takes p, v, delta, lam
// and gather only.
template <class T>
struct StepArgs {
  int64_t n;
  T* p;
  const T* g;                     // null with factors
  const GradFactors<T>* factors;  // of the gradient, which then is never written; null: none
  T* v;
  T* m;                   // null: no momentum
  const uint8_t* active;  // null: all; else only where it is 1, the others and their state stand still
  double lr, beta, delta, lam, weight_decay, sign;
  int threads;
  const GatherArgs<T>* gather = nullptr;
};

template <class T>
struct AdaStepArgs {
  int64_t n;
  T* p;
  const T* g;
  const GradFactors<T>* factors;
  T* v;
  T* m;
  T* s;
  const uint8_t* active;  // as in StepArgs
  double lr, beta1, beta2, eps;
  double correction1, correction2;  // 1 - beta^k at step k
  double delta, lam, weight_decay, sign;
  bool decoupled;
  int threads;
  const GatherArgs<T>* gather = nullptr;
};

// An activation over a packed tensor of n elements, and its gradient.
template <class T>
struct PointwiseArgs {
  int64_t n;
  const T* x;
  const T* grad_y;
  T* out;
  int threads;
};

// Max pooling of `planes` images in the lane layout: x [planes][H][W][16], y, codes [planes][OH][OW][16].
template <class T>
struct PoolArgs {
  int64_t planes;
  int H, W, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW;
  const T* x;
  T* y;
  uint8_t* codes;
  const T* grad_y;
  T* grad_x;
  int threads;
};

// Batch norm in the lane layout: x, y, residual, result, grad_y, grad_more, grad [ceil(N/16)][C][P][16], the rest [C].
template <class T>
struct NormArgs {
  int64_t N, C, P;
  const T* x;
  T* y;
  const T* residual;        // null: none
  const T* residual_scale;  // null: the residual as it is; else it goes through a norm of its own
  const T* residual_shift;
  bool relu;
  const T* grad_y;
  const T* grad_more;  // null: none; else added to grad_y
  // A ReLU behind lets a gradient pass where its result is positive: `result`, or relu_scale * x + relu_shift, or no
  // ReLU where all are null.
  const T* result;
  const T* relu_scale;
  const T* relu_shift;
  T* grad;  // null: not wanted; what passed the ReLU
  T* mean;
  T* var;
  const T* scale;
  const T* shift;
  const T* slope;
  T* sum_g;
  T* sum_gx;
  int threads;
};

// See marks.h; T is uint8_t for masks.
template <class T>
using MarkNonzeros = int64_t (*)(const T* dense, int64_t rows, int64_t cols, uint64_t* bits, int32_t* rowptr,
                                 int threads);

template <class T>
struct Kernels {
  void (*linear_forward)(const LinearArgs<T>&);
  void (*linear_backward)(const LinearArgs<T>&);
  int64_t (*count_nonzeros)(const T* x, int64_t n, int threads);
  void (*factor_grad)(const FactorArgs<T>&);
  void (*weight_grad)(const GradFactors<T>&, T* grad_weight, int threads);
  void (*conv2d_forward)(const ConvArgs<T>&);
  void (*conv2d_backward)(const ConvArgs<T>&);
  void (*conv2d_weight_grad)(const ConvArgs<T>&);
  void (*pack)(const PackArgs<T>&);
  void (*unpack)(const PackArgs<T>&);
  // Steps say whether every nonzero weight stands in the index of `gather`; without one, yes.
  bool (*linbreg_step)(const StepArgs<T>&);
  bool (*l1_shift)(const StepArgs<T>&);
  bool (*adabreg_step)(const AdaStepArgs<T>&);
  bool (*proxsgd_step)(const StepArgs<T>&);
  void (*hardswish_forward)(const PointwiseArgs<T>&);
  void (*hardswish_backward)(const PointwiseArgs<T>&);
  void (*max_pool_forward)(const PoolArgs<T>&);
  void (*max_pool_backward)(const PoolArgs<T>&);
  void (*norm_stats)(const NormArgs<T>&);
  void (*norm_apply)(const NormArgs<T>&);
  void (*norm_reduce)(const NormArgs<T>&);
  void (*norm_grad)(const NormArgs<T>&);
  MarkNonzeros<T> mark_nonzeros;
  int64_t (*mark_beyond)(const T* dense, int64_t rows, int64_t cols, T bound, uint64_t* bits, int32_t* rowptr,
                         int threads);
  bool (*gather_all)(const T* dense, const Index&, const uint64_t* bits, T* values, int threads);
};

struct Table {
  const char* isa;
  Kernels<float> f32;
  Kernels<double> f64;
  MarkNonzeros<uint8_t> mark_mask;
};

}  // namespace sparsebreg
