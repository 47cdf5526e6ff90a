// A step of bigkernel.optim on the tensors of the step before, with new gradients. To collect
// thousands of small tensors in Python and box them for the dispatcher takes longer than to update
// them. Here Python's own lists and dicts are compared with what they held before, and the
// gradients are read through DLPack's C functions, which torch.Tensor offers and which allocate
// nothing.
#include "python/adam_plan.h"

#include <pybind11/stl.h>

#include <exception>
#include <optional>
#include <thread>
#include <vector>

#include "adam/adam.h"
#include "cpu/parallel.h"
#include "python/dlpack.h"

namespace py = pybind11;

namespace bigkernel {
namespace {

constexpr size_t kAlone = 250;  // fewer parameters are not worth a second thread

class GradientReader {
 public:
  GradientReader() {
    type_ = py::module_::import("torch").attr("Tensor");
    is_negated_ = type_.attr("is_neg");
    const py::object capsule = py::getattr(type_, dlpack::kTableAttribute, py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kTableName)) return;
    const auto* table =
        static_cast<dlpack::Table*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kTableName));
    if (table->major == 1) view_of_ = table->view_of_object;
  }

  bool works() const { return view_of_ != nullptr; }  // not where torch has no such table

  // Nothing if it is anything else than a plain contiguous tensor on the CPU of a type that Adam
  // knows, whose memory holds its values and not their negatives.
  std::optional<AdamGradient> read(PyObject* tensor) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != type_.ptr()) return std::nullopt;
    dlpack::View t;
    if (view_of_(tensor, &t) != 0) {
      PyErr_Clear();
      return std::nullopt;
    }
    const bool wide = t.dtype.code == dlpack::kFloat && t.dtype.bits == 32;
    const bool fp16 = t.dtype.code == dlpack::kFloat && t.dtype.bits == 16;
    const bool bf16 = t.dtype.code == dlpack::kBfloat && t.dtype.bits == 16;
    if (t.device.type != dlpack::kCpu || t.dtype.lanes != 1 || !(wide || fp16 || bf16))
      return std::nullopt;
    int64_t numel = 1;
    for (int32_t d = t.ndim - 1; d >= 0; --d) {
      if (t.shape[d] != 1 && t.strides[d] != numel) return std::nullopt;
      numel *= t.shape[d];
    }
    PyObject* negated = PyObject_Vectorcall(is_negated_.ptr(), &tensor, 1, nullptr);
    if (negated == nullptr) throw py::error_already_set();
    Py_DECREF(negated);  // True and False live on
    if (negated != Py_False) return std::nullopt;
    return AdamGradient{static_cast<char*>(t.data) + t.byte_offset, numel,
                        wide ? DType::kFloat32 : (fp16 ? DType::kFloat16 : DType::kBFloat16)};
  }

 private:
  py::object type_, is_negated_;
  int (*view_of_)(void*, dlpack::View*) = nullptr;
};

// Never destroyed: it holds Python objects.
const GradientReader& reader() {
  static const auto& made = *new GradientReader;
  return made;
}

// The gradients of parameters, which it keeps alive. Of fewer, if one of them cannot be read.
class Gradients {
 public:
  void read(const py::list& params) {
    was_read_ = true;
    static PyObject* const name = PyUnicode_InternFromString("grad");
    held_.reserve(params.size());
    list_.reserve(params.size());
    for (const py::handle param : params) {
      held_.push_back(py::reinterpret_steal<py::object>(PyObject_GetAttr(param.ptr(), name)));
      if (!held_.back()) throw py::error_already_set();
      const std::optional<AdamGradient> grad = reader().read(held_.back().ptr());
      if (!grad) return;
      list_.push_back(*grad);
    }
  }
  bool was_read() const { return was_read_; }
  const std::vector<AdamGradient>& list() const { return list_; }

 private:
  bool was_read_ = false;
  std::vector<py::object> held_;
  std::vector<AdamGradient> list_;
};

// Whether the lists of all groups, one after another, hold just these objects.
bool is_same_list(const py::list& groups, const py::list& objects) {
  Py_ssize_t met = 0;
  const Py_ssize_t count = PyList_GET_SIZE(objects.ptr());
  for (const py::handle group : groups) {
    if (!PyList_Check(group.ptr())) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(group.ptr()); ++i, ++met)
      if (met == count || PyList_GET_ITEM(group.ptr(), i) != PyList_GET_ITEM(objects.ptr(), met))
        return false;
  }
  return met == count;
}

// Whether a walk through optimizer.state meets just these objects: each parameter's dict, then its
// keys and values.
bool is_same_state(const py::object& state, const py::list& objects) {
  if (!PyDict_Check(state.ptr())) return false;
  Py_ssize_t met = 0;
  const Py_ssize_t count = PyList_GET_SIZE(objects.ptr());
  const auto meets = [&](PyObject* object) {
    return met < count && PyList_GET_ITEM(objects.ptr(), met++) == object;
  };
  PyObject *owner, *entries, *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &owner, &entries);) {
    if (!PyDict_Check(entries) || !meets(entries)) return false;
    for (Py_ssize_t inner = 0; PyDict_Next(entries, &inner, &key, &value);)
      if (!meets(key) || !meets(value)) return false;
  }
  return met == count;
}

std::optional<double> run_plan(int64_t number, const py::list& group_params, const py::list& params,
                               const py::object& state, const py::list& state_objects,
                               const std::vector<AdamGroup>& groups, std::optional<double> max_norm,
                               std::optional<uint64_t> seed) {
  if (!reader().works() || !is_same_list(group_params, params) ||
      !is_same_state(state, state_objects))
    return std::nullopt;
  Gradients gradients;
  bool same = false;
  std::exception_ptr error;
  const auto caller = std::this_thread::get_id();
  const auto read = [&] {
    try {
      gradients.read(params);
    } catch (...) {
      error = std::current_exception();
    }
  };
  // Side by side: another thread looks at the memory while this one, which holds the GIL, reads.
  parallel_for(2, params.size() < kAlone ? 2 : 1, [&](int64_t begin, int64_t end) {
    if (begin == 0 && std::this_thread::get_id() == caller) read();
    if (end == 2) same = adam_plan_is_unchanged(number);
  });
  if (!gradients.was_read()) read();
  if (error) std::rethrow_exception(error);
  if (!same || gradients.list().size() != params.size()) return std::nullopt;
  const py::gil_scoped_release release;
  return adam_run_plan(number, gradients.list(), groups, max_norm, seed);
}

}  // namespace

void bind_adam_plan(py::module_& m) {
  py::class_<AdamGroup>(m, "AdamHyperParameters", "Of one group, for adam_run_plan.")
      .def(py::init<int32_t, double, double, double, double, double>(), py::arg("flags"),
           py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
           py::arg("weight_decay"));
  m.def("adam_run_plan", &run_plan, py::arg("plan"), py::arg("group_params"), py::arg("params"),
        py::arg("state"), py::arg("state_objects"), py::arg("groups"), py::arg("max_norm"),
        py::arg("seed"),
        "One step of a plan; the norm, or 0 without max_norm. None, and nothing is done, where the "
        "groups' lists or the state hold other objects than `params` and `state_objects`, a tensor "
        "has other memory, or a gradient is missing or unusual.");
}

}  // namespace bigkernel
