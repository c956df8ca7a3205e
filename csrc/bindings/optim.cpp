// Optimizer steps. Each returns whether every nonzero weight is at a place of the index that it gathers at; without
// one, true.
#include "bindings/native_grad.h"
#include "bindings/native_index.h"

namespace sparsebreg {
namespace {

// A gradient as an array, or in factors.
using Gradient = std::variant<Array, const NativeGrad*>;

// Where a step gathers the weights that it has moved: an index, and an array for the values at its places.
using MaybeGather = std::optional<std::tuple<const NativeIndex*, Array>>;

// Sets what all steps with a gradient take; g has to outlive the call of the kernel.
template <class T, template <class> class Args>
void set_step(Args<T>& a, const Array& p, const Gradient& g, const Maybe& active, double lr, double lam,
              double weight_decay, bool maximize, int threads) {
  a.n = p.size;
  a.p = out<T>("p", p, a.n);
  double work = double(a.n);
  if (const auto* given = std::get_if<Array>(&g)) {
    a.g = in<T>("g", *given, a.n);
  } else {
    const NativeGrad* factors = std::get<const NativeGrad*>(g);
    if (!factors) throw py::type_error("g: expected an array or a Gradient, got None");
    a.factors = &factors->factors<T>(a.n);
    work *= double(a.factors->N);
  }
  a.threads = team(threads, work);
  a.active = reinterpret_cast<const uint8_t*>(maybe_in<bool>("active", active, a.n));
  a.lr = lr, a.lam = lam, a.weight_decay = weight_decay;
  a.sign = maximize ? -1.0 : 1.0;
}

template <class T, template <class> class Args>
bool run_step(bool (*step)(const Args<T>&), Args<T>& a, const MaybeGather& gather) {
  GatherArgs<T> gathered;
  if (gather) {
    const auto& [pattern, values] = *gather;
    if (!pattern) throw py::type_error("gather: expected an Index and an array, got None");
    const Index& ix = pattern->index;
    if (ix.rows * ix.cols != a.n)
      refuse("gather", "an index of " + std::to_string(a.n) + " places", std::to_string(ix.rows * ix.cols));
    gathered = {&ix, pattern->marks(a.threads), out<T>("values", values, ix.nnz)};
    a.gather = &gathered;
  }
  return run(step, a);
}

bool linbreg_step(const Array& p, const Gradient& g, const Array& v, const Maybe& m, const Maybe& active, double lr,
                  double beta, double delta, double lam, double weight_decay, bool maximize, const MaybeGather& gather,
                  int threads) {
  return for_dtype(p, [&](auto zero) {
    using T = decltype(zero);
    StepArgs<T> a{};
    set_step(a, p, g, active, lr, lam, weight_decay, maximize, threads);
    a.v = out<T>("v", v, a.n);
    a.m = maybe_out<T>("m", m, a.n);
    a.beta = beta, a.delta = delta;
    return run_step(kernels_of<T>().linbreg_step, a, gather);
  });
}

bool l1_shift(const Array& p, const Array& v, double delta, double lam, const MaybeGather& gather, int threads) {
  return for_dtype(p, [&](auto zero) {
    using T = decltype(zero);
    StepArgs<T> a{};
    a.n = p.size;
    a.p = out<T>("p", p, a.n);
    a.v = out<T>("v", v, a.n);
    a.delta = delta, a.lam = lam;
    a.threads = team(threads, double(a.n));
    return run_step(kernels_of<T>().l1_shift, a, gather);
  });
}

bool proxsgd_step(const Array& p, const Gradient& g, const Maybe& m, const Maybe& active, double lr, double beta,
                  double lam, double weight_decay, bool maximize, const MaybeGather& gather, int threads) {
  return for_dtype(p, [&](auto zero) {
    using T = decltype(zero);
    StepArgs<T> a{};
    set_step(a, p, g, active, lr, lam, weight_decay, maximize, threads);
    a.m = maybe_out<T>("m", m, a.n);
    a.beta = beta;
    return run_step(kernels_of<T>().proxsgd_step, a, gather);
  });
}

bool adabreg_step(const Array& p, const Gradient& g, const Array& v, const Array& m, const Array& s,
                  const Maybe& active, double lr, double beta1, double beta2, double eps, double correction1,
                  double correction2, double delta, double lam, double weight_decay, bool decoupled, bool maximize,
                  const MaybeGather& gather, int threads) {
  return for_dtype(p, [&](auto zero) {
    using T = decltype(zero);
    AdaStepArgs<T> a{};
    set_step(a, p, g, active, lr, lam, weight_decay, maximize, threads);
    a.v = out<T>("v", v, a.n);
    a.m = out<T>("m", m, a.n);
    a.s = out<T>("s", s, a.n);
    a.beta1 = beta1, a.beta2 = beta2, a.eps = eps;
    a.correction1 = correction1, a.correction2 = correction2;
    a.delta = delta, a.decoupled = decoupled;
    return run_step(kernels_of<T>().adabreg_step, a, gather);
  });
}

}  // namespace

void register_optim(py::module_& m) {
  m.def("linbreg_step", &linbreg_step);
  m.def("l1_shift", &l1_shift);
  m.def("adabreg_step", &adabreg_step);
  m.def("proxsgd_step", &proxsgd_step);
}

}  // namespace sparsebreg
