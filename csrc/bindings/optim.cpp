// Optimizer steps.
#include "bindings/native_grad.h"
#include "bindings/native_index.h"

namespace sparsebreg {
namespace {

// A gradient, or what it is to be made of.
using Gradient = std::variant<Array, const NativeGrad*>;

// Sets a.g, or a.factors to `room`, and the threads; a.n is known.
template <class Args, class T>
void take_gradient(Args& a, const Gradient& g, GradFactors<T>& room, int threads) {
  if (const auto* given = std::get_if<Array>(&g)) {
    a.g = in<T>("g", *given, a.n);
    a.threads = team(threads, double(a.n));
  } else {
    const NativeGrad* factors = std::get<const NativeGrad*>(g);
    if (!factors) throw py::type_error("g: expected an array or a Gradient, got None");
    room = factors->factors<T>(a.n);
    a.factors = &room;
    a.threads = team(threads, double(a.n) * double(room.N));
  }
}

// Where a step gathers what it moves to: an index, and an array for its values.
using MaybeGather = std::optional<std::tuple<const NativeIndex*, Array>>;

// Sets a.gather to `room`; a.n and a.threads are known.
template <class Args, class T>
void set_gather(Args& a, const MaybeGather& gather, GatherArgs<T>& room) {
  if (!gather) return;
  const auto& [pattern, values] = *gather;
  if (!pattern) throw py::type_error("gather: expected an Index and an array, got None");
  const Index& ix = pattern->index;
  if (ix.rows * ix.cols != a.n)
    refuse("gather", "an index of " + std::to_string(a.n) + " places", std::to_string(ix.rows * ix.cols));
  room = {&ix, pattern->marks(a.threads), out<T>("values", values, ix.nnz)};
  a.gather = &room;
}

template <class T>
StepArgs<T> step_args(const Array& p, const Gradient& g, GradFactors<T>& factors, const Maybe& m, const Maybe& active,
                      double lr, double beta, double lam, double weight_decay, bool maximize, int threads) {
  const int64_t n = p.size;
  StepArgs<T> a{};
  a.n = n;
  a.p = out<T>("p", p, n);
  take_gradient(a, g, factors, threads);
  a.m = maybe_out<T>("m", m, n);
  a.active = reinterpret_cast<const uint8_t*>(maybe_in<bool>("active", active, n));
  a.lr = lr, a.beta = beta, a.lam = lam, a.weight_decay = weight_decay;
  a.sign = maximize ? -1.0 : 1.0;
  return a;
}

// Steps say whether every nonzero weight stands in the index of `gather`; without one, yes.

bool linbreg_step(const Array& p, const Gradient& g, const Array& v, const Maybe& m, const Maybe& active, double lr,
                  double beta, double delta, double lam, double weight_decay, bool maximize, const MaybeGather& gather,
                  int threads) {
  bool inside = true;
  for_dtype(p, [&](auto zero) {
    using T = decltype(zero);
    GradFactors<T> factors;
    GatherArgs<T> gathered;
    StepArgs<T> a = step_args<T>(p, g, factors, m, active, lr, beta, lam, weight_decay, maximize, threads);
    a.v = out<T>("v", v, a.n);
    a.delta = delta;
    set_gather(a, gather, gathered);
    py::gil_scoped_release nogil;
    inside = kernels_of<T>().linbreg_step(a);
  });
  return inside;
}

bool l1_shift(const Array& p, const Array& v, double delta, double lam, const MaybeGather& gather, int threads) {
  bool inside = true;
  for_dtype(p, [&](auto zero) {
    using T = decltype(zero);
    StepArgs<T> a{};
    a.n = p.size;
    a.p = out<T>("p", p, a.n);
    a.v = out<T>("v", v, a.n);
    a.delta = delta, a.lam = lam;
    a.threads = team(threads, double(a.n));
    GatherArgs<T> gathered;
    set_gather(a, gather, gathered);
    py::gil_scoped_release nogil;
    inside = kernels_of<T>().l1_shift(a);
  });
  return inside;
}

bool proxsgd_step(const Array& p, const Gradient& g, const Maybe& m, const Maybe& active, double lr, double beta,
                  double lam, double weight_decay, bool maximize, const MaybeGather& gather, int threads) {
  bool inside = true;
  for_dtype(p, [&](auto zero) {
    using T = decltype(zero);
    GradFactors<T> factors;
    GatherArgs<T> gathered;
    StepArgs<T> a = step_args<T>(p, g, factors, m, active, lr, beta, lam, weight_decay, maximize, threads);
    set_gather(a, gather, gathered);
    py::gil_scoped_release nogil;
    inside = kernels_of<T>().proxsgd_step(a);
  });
  return inside;
}

bool adabreg_step(const Array& p, const Gradient& g, const Array& v, const Array& m, const Array& s,
                  const Maybe& active, double lr, double beta1, double beta2, double eps, double correction1,
                  double correction2, double delta, double lam, double weight_decay, bool decoupled, bool maximize,
                  const MaybeGather& gather, int threads) {
  bool inside = true;
  for_dtype(p, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = p.size;
    AdaStepArgs<T> a{};
    a.n = n;
    a.p = out<T>("p", p, n);
    GradFactors<T> factors;
    take_gradient(a, g, factors, threads);
    a.v = out<T>("v", v, n);
    a.m = out<T>("m", m, n);
    a.s = out<T>("s", s, n);
    a.active = reinterpret_cast<const uint8_t*>(maybe_in<bool>("active", active, n));
    a.lr = lr, a.beta1 = beta1, a.beta2 = beta2, a.eps = eps;
    a.correction1 = correction1, a.correction2 = correction2;
    a.delta = delta, a.lam = lam, a.weight_decay = weight_decay;
    a.sign = maximize ? -1.0 : 1.0;
    a.decoupled = decoupled;
    GatherArgs<T> gathered;
    set_gather(a, gather, gathered);
    py::gil_scoped_release nogil;
    inside = kernels_of<T>().adabreg_step(a);
  });
  return inside;
}

}  // namespace

void register_optim(py::module_& m) {
  m.def("linbreg_step", &linbreg_step);
  m.def("l1_shift", &l1_shift);
  m.def("proxsgd_step", &proxsgd_step);
  m.def("adabreg_step", &adabreg_step);
}

}  // namespace sparsebreg
