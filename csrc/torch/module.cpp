// The Python module fastconv._C: the kernel table, the choice, and what was built. The operators
// themselves are not here: they are registered with torch's dispatcher when this library loads.
#include <dlfcn.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <map>

#include "core/arches.h"
#include "cpu/isa.h"
#include "torch/arguments.h"
#include "torch/autotune.h"
#include "torch/explain.h"
#include "torch/launch.h"
#include "torch/packed_filters.h"
#include "torch/precision.h"
#include "torch/selection.h"
#include "torch/triton.h"

namespace py = pybind11;

namespace fastconv {
namespace {

std::vector<std::string> dtype_names(DTypeSet set) {
  std::vector<std::string> names;
  for (const DType t : {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16}) {
    if (set & bit(t)) names.emplace_back(name_of(t));
  }
  return names;
}

std::vector<std::string> layout_names(LayoutSet set) {
  std::vector<std::string> names;
  for (const Layout l : {Layout::kNCHW, Layout::kNHWC}) {
    if (set & bit(l)) names.emplace_back(name_of(l));
  }
  return names;
}

template <class K>
void append_rows(py::list& out, const std::vector<K>& rows) {
  for (const K& row : rows) {
    out.append(py::make_tuple(row.name, row.op, name_of(row.direction), name_of(row.backend),
                              row.arch, dtype_names(row.dtypes), layout_names(row.layouts)));
  }
}

py::list kernels() {
  py::list out;
  append_rows(out, kernel_table().conv2d);
  append_rows(out, kernel_table().pool2d);
  append_rows(out, kernel_table().batch_norm);
  return out;
}

const std::map<std::string, Backend>& backends() {
  static const std::map<std::string, Backend> names = [] {
    std::map<std::string, Backend> m;
    for (const Backend b :
         {Backend::kCuda, Backend::kTriton, Backend::kCpu, Backend::kEmulator, Backend::kAten}) {
      m[name_of(b)] = b;
    }
    return m;
  }();
  return names;
}

Direction direction_of(const std::string& name) {
  for (const Direction d :
       {Direction::kFprop, Direction::kDgrad, Direction::kWgrad, Direction::kBgrad}) {
    if (name == name_of(d)) return d;
  }
  throw py::value_error("direction must be fprop, dgrad, wgrad or bgrad, but got '" + name + "'");
}

const std::map<std::string, WinogradMode>& winograd_modes() {
  static const std::map<std::string, WinogradMode> names = [] {
    std::map<std::string, WinogradMode> m;
    for (const WinogradMode w :
         {WinogradMode::kFast, WinogradMode::kAccurate, WinogradMode::kOff}) {
      m[name_of(w)] = w;
    }
    return m;
  }();
  return names;
}

// (forced backend or None, forced kernel or None, fallback allowed, Winograd's mode) of the calling
// thread.
py::tuple get_selection() {
  const Selection& s = current_selection();
  return py::make_tuple(s.backend_forced ? py::object(py::str(name_of(s.backend))) : py::none(),
                        s.kernel.empty() ? py::object(py::none()) : py::str(s.kernel),
                        s.allow_fallback, name_of(s.winograd));
}

void set_selection(const std::optional<std::string>& backend,
                   const std::optional<std::string>& kernel, bool allow_fallback,
                   const std::string& winograd) {
  Selection s;
  if (backend) {
    const auto found = backends().find(*backend);
    if (found == backends().end()) throw py::value_error("no backend is named '" + *backend + "'");
    s.backend_forced = true;
    s.backend = found->second;
  }
  s.kernel = kernel.value_or("");
  s.allow_fallback = allow_fallback;
  s.winograd = winograd_modes().at(winograd);
  current_selection() = std::move(s);
}

std::vector<c10::SymInt> symbolic(const std::vector<int64_t>& values) {
  return {values.begin(), values.end()};
}

py::tuple explain(const std::string& direction, const at::Tensor& input, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                  int64_t groups) {
  const Explanation e =
      explain_conv2d(direction_of(direction), input, weight, bias, symbolic(stride),
                     symbolic(padding), symbolic(dilation), groups);
  py::list candidates;
  for (const Candidate& c : e.candidates) {
    candidates.append(py::make_tuple(c.name, c.reason, c.cost_us));
  }
  return py::make_tuple(e.chosen, e.reason, candidates);
}

// Adds the rows of the emulator, a library that fastconv/emulator.py has compiled. It stays loaded.
void load_emulator(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw py::import_error(dlerror());
  void* add = dlsym(library, "fastconv_emulator_add_kernels");
  if (add == nullptr) throw py::import_error(path + " is not fastconv's emulator");
  extend_kernel_table(reinterpret_cast<void (*)(KernelTable&)>(add));
}

}  // namespace
}  // namespace fastconv

PYBIND11_MODULE(_C, m) {
  using namespace fastconv;
  m.doc() = "fastconv's compiled part; use the package's Python face instead";
  m.def("kernels", &kernels);
  m.def("explain_conv2d", &explain);
  m.def("get_selection", &get_selection);
  m.def("set_selection", &set_selection);
  m.def("load_emulator", &load_emulator);
  m.def("refuse_architecture", &refuse_architecture);
  m.def("conv_may_use_tf32", &conv_may_use_tf32);
  m.def("set_tf32_on_cpu", [](bool allowed) { return tf32_on_cpu.exchange(allowed); });
  m.def("kept_filters", [] {
    const KeptFilters kept = kept_filters();
    return std::pair(kept.count, kept.bytes);
  });
  m.def("forget_filters", &forget_filters);
  bind_triton(m);
  bind_autotune(m);
  m.def("cpu_isa", [] { return std::string(name_of(host_isa())); });
#ifdef FASTCONV_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
}
