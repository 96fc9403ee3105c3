#include "torch/triton.h"

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "torch/fields.h"
#include "torch/python.h"
#include "triton/table.h"

namespace py = pybind11;

namespace fastconv {
namespace {

// Python callables, never released: a launch may come from any thread until the process ends.
std::atomic<PyObject*> launcher{nullptr};        // launch(row, problem, pointers, device)
std::atomic<PyObject*> gpu_properties{nullptr};  // (sm_arch, sm_count, shared_memory) of an index
std::atomic<bool> interpreted{false};            // TRITON_INTERPRET=1
std::atomic<const char*> refusal{"Triton is not installed"};  // where no launcher is

// ---- what Python is told of a call: the fields of fastconv/triton_kernels/problem.py ----

template <class Visitor>
void visit_pointers(const Conv2dArgs& a, Visitor& visit) {
  visit("input", a.input);
  visit("filter", a.filter);
  visit("grad", a.grad);
  visit("scale", a.scale);
  visit("shift", a.shift);
  visit("residual", a.residual);
  visit("out", a.out);
  visit("mean_out", a.mean_out);
  visit("var_out", a.var_out);
}

template <class Visitor>
void visit_pointers(const Pool2dArgs& a, Visitor& visit) {
  visit("input", a.input);
  visit("grad", a.grad);
  visit("index_in", a.index_in);
  visit("index_out", a.index_out);
  visit("out", a.out);
}

template <class Visitor>
void visit_pointers(const BatchNormArgs& a, Visitor& visit) {
  visit("input", a.input);
  visit("residual", a.residual);
  visit("grad", a.grad);
  visit("output", a.output);
  visit("weight", a.weight);
  visit("bias", a.bias);
  visit("mean_in", a.mean_in);
  visit("var_in", a.var_in);
  visit("mean_out", a.mean_out);
  visit("var_out", a.var_out);
  visit("out", a.out);
  visit("grad_residual", a.grad_residual);
  visit("grad_weight", a.grad_weight);
  visit("grad_bias", a.grad_bias);
}

// Whether 16 bytes at a time may be moved from the start of every tensor.
template <class Args>
bool aligned(const Args& args) {
  bool all = true;
  auto look = [&](const char*, const void* pointer) {
    all = all && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  visit_pointers(args, look);
  return all;
}

template <class Visitor>
void visit_problem(const Conv2dProblem& p, const Conv2dArgs& args, Visitor& visit) {
  visit_fields(p, visit);
  visit("aligned", aligned(args));
}

const char* kind_name(PoolKind kind) {
  return kind == PoolKind::kMax       ? "max"
         : kind == PoolKind::kAverage ? "average"
                                      : "adaptive_average";
}

const char* index_name(PoolIndex index) {
  return index == PoolIndex::kNone       ? "none"
         : index == PoolIndex::kOffset8  ? "uint8"
         : index == PoolIndex::kOffset32 ? "int32"
                                         : "int64";
}

template <class Visitor>
void visit_problem(const Pool2dProblem& p, const Pool2dArgs& args, Visitor& visit) {
  visit("kind", kind_name(p.kind));
  visit("N", p.N);
  visit("C", p.C);
  visit("H", p.H);
  visit("W", p.W);
  visit("P", p.P);
  visit("Q", p.Q);
  visit("R", p.R);
  visit("S", p.S);
  visit("stride_h", p.stride_h);
  visit("stride_w", p.stride_w);
  visit("pad_h", p.pad_h);
  visit("pad_w", p.pad_w);
  visit("dil_h", p.dil_h);
  visit("dil_w", p.dil_w);
  visit("count_include_pad", p.count_include_pad);
  visit("divisor_override", p.divisor_override);
  visit("index", index_name(p.index));
  visit("dtype", name_of(p.dtype));
  visit("layout", name_of(p.layout));
  visit("aligned", aligned(args));
}

template <class Visitor>
void visit_problem(const BatchNormProblem& p, const BatchNormArgs& args, Visitor& visit) {
  visit("N", p.N);
  visit("C", p.C);
  visit("H", p.H);
  visit("W", p.W);
  visit("eps", p.eps);
  visit("training", p.training);
  visit("dtype", name_of(p.dtype));
  visit("layout", name_of(p.layout));
  visit("activation", name_of(p.activation));
  visit("slope", p.slope);
  visit("weight", args.weight != nullptr);
  visit("bias", args.bias != nullptr);
  visit("residual", args.residual != nullptr);
  visit("output", args.output != nullptr);
  visit("out", args.out != nullptr);
  visit("grad_residual", args.grad_residual != nullptr);
  visit("aligned", aligned(args));
}

struct Names {
  std::vector<std::string> names;
  template <class T>
  void operator()(const char* name, const T&) {
    names.emplace_back(name);
  }
};

template <class Args>
std::vector<std::string> pointer_names() {
  Names visitor;
  visit_pointers(Args(), visitor);
  return visitor.names;
}

template <class Problem, class Args>
std::vector<std::string> problem_names() {
  Names visitor;
  visit_problem(Problem(), Args(), visitor);
  return visitor.names;
}

// One string object a literal: they are hashed once, and compared by identity. Under the GIL.
PyObject* interned(const char* literal) {
  static std::unordered_map<const char*, PyObject*> strings;
  PyObject*& string = strings[literal];
  if (string == nullptr) string = PyUnicode_InternFromString(literal);
  return string;
}

class TupleFiller {
 public:
  explicit TupleFiller(size_t size) : tuple_(steal(PyTuple_New(static_cast<Py_ssize_t>(size)))) {}
  void operator()(const char*, int64_t value) { add(PyLong_FromLongLong(value)); }
  void operator()(const char*, bool value) { add(PyBool_FromLong(value)); }
  void operator()(const char*, double value) { add(PyFloat_FromDouble(value)); }
  void operator()(const char*, const char* value) { add(Py_XNewRef(interned(value))); }
  void operator()(const char*, const void* value) {
    add(PyLong_FromUnsignedLongLong(reinterpret_cast<uintptr_t>(value)));
  }
  const py::object& tuple() const { return tuple_; }

 private:
  void add(PyObject* item) {
    if (item == nullptr) throw_python_error();
    PyTuple_SET_ITEM(tuple_.ptr(), next_++, item);
  }
  py::object tuple_;
  Py_ssize_t next_ = 0;
};

// CPython's own calls throughout: a launch should not wait for its host.
template <class Problem, class Args>
void launch(const char* row, const Problem& problem, const Args& args, const Context& context) {
  static const size_t fields = problem_names<Problem, Args>().size();
  static const size_t addresses = pointer_names<Args>().size();
  py::gil_scoped_acquire gil;
  TupleFiller described(fields), pointers(addresses);
  visit_problem(problem, args, described);
  visit_pointers(args, pointers);
  const py::object device = steal(PyLong_FromLong(context.device));
  PyObject* arguments[] = {interned(row), described.tuple().ptr(), pointers.tuple().ptr(),
                           device.ptr()};
  steal(PyObject_Vectorcall(launcher.load(), arguments, 4, nullptr));
}

void register_triton(const py::object& launch, const py::object& properties) {
  gpu_properties.store(properties.inc_ref().ptr());
  launcher.store(launch.inc_ref().ptr());
}

// Never freed: rows say it for as long as the process lives.
void refuse_triton(const std::string& why) { refusal.store((new std::string(why))->c_str()); }

py::dict triton_fields() {
  py::dict fields;
  fields["conv2d"] =
      py::make_tuple(problem_names<Conv2dProblem, Conv2dArgs>(), pointer_names<Conv2dArgs>());
  fields["pool2d"] =
      py::make_tuple(problem_names<Pool2dProblem, Pool2dArgs>(), pointer_names<Pool2dArgs>());
  fields["batch_norm"] = py::make_tuple(problem_names<BatchNormProblem, BatchNormArgs>(),
                                        pointer_names<BatchNormArgs>());
  return fields;
}

Device ask_python(int index) {
  py::gil_scoped_acquire gil;
  Device device;
  device.type = Device::Type::kCuda;
  const py::object argument = steal(PyLong_FromLong(index));
  const py::object found = steal(PyObject_CallOneArg(gpu_properties.load(), argument.ptr()));
  std::tie(device.sm_arch, device.sm_count, device.shared_memory_per_block) =
      found.cast<std::tuple<int, int, int64_t>>();
  return device;
}

}  // namespace

const char* why_no_triton(bool gpu) {
  if (launcher.load() == nullptr) return refusal;
  if (gpu) return interpreted ? "TRITON_INTERPRET=1 runs Triton kernels on CPU tensors" : nullptr;
  return interpreted ? nullptr
                     : "runs on CUDA tensors, and on CPU tensors where TRITON_INTERPRET=1";
}

Device gpu_seen_from_python(int index) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = known.find(index); found != known.end()) return found->second;
  }
  Device device;
  device.type = Device::Type::kCuda;
  if (gpu_properties.load() == nullptr) return device;
  device = ask_python(index);  // without the lock: a thread that holds the GIL may wait for it
  std::lock_guard<std::mutex> lock(mutex);
  return known.emplace(index, device).first->second;
}

void launch_triton(const char* row, const Conv2dProblem& problem, const Conv2dArgs& args,
                   const Context& context) {
  launch(row, problem, args, context);
}
void launch_triton(const char* row, const Pool2dProblem& problem, const Pool2dArgs& args,
                   const Context& context) {
  launch(row, problem, args, context);
}
void launch_triton(const char* row, const BatchNormProblem& problem, const BatchNormArgs& args,
                   const Context& context) {
  launch(row, problem, args, context);
}

void bind_triton(py::module_& m) {
  m.def("register_triton", &register_triton);
  m.def("refuse_triton", &refuse_triton);
  m.def("set_triton_interpreted", [](bool on) { interpreted = on; });
  m.def("triton_fields", &triton_fields);
}

}  // namespace fastconv
