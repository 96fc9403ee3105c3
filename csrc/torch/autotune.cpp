#include "torch/autotune.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "torch/fields.h"
#include "torch/launch.h"
#include "torch/python.h"

namespace py = pybind11;

namespace fastconv {
namespace {

// Python callables, never released: a launch may come from any thread until the process ends.
std::atomic<PyObject*> load{nullptr};  // load(device): calls set_measured_row for what is known
std::atomic<PyObject*> time_rows{nullptr};  // time_rows(device, key, names, run) -> index or None
std::atomic<bool> measuring{false};

// By device (an index; -1: the CPU) and problem, the name of a row.
struct Choices {
  std::mutex mutex;
  std::map<int, std::map<std::string, std::string>> rows;
  std::atomic<uint64_t> loaded{0};  // a bit a device; nobody has more than 63 GPUs
  std::atomic<uint64_t> any{0};     // likewise: something is known
};
Choices& choices() {
  static Choices all;
  return all;
}

uint64_t bit_of(int device) { return uint64_t{1} << ((device + 1) % 64); }

int index_of(const at::Tensor& t) { return t.is_cuda() ? static_cast<int>(t.get_device()) : -1; }

struct Text {
  std::ostringstream out;
  void operator()(const char* name, const char* value) { out << ' ' << name << '=' << value; }
  void operator()(const char* name, bool value) {
    if (value) out << ' ' << name;
  }
  template <class T>
  void operator()(const char* name, const T& value) {
    out << ' ' << name << '=' << value;
  }
};

// One line that names the problem, and of the machine what a user may change.
std::string key_of(Direction direction, const Conv2dProblem& p, const Device& device) {
  Text text;
  text.out << "conv2d " << name_of(direction);
  visit_fields(p, text);
  if (device.type == Device::Type::kCpu) {
    text("threads", device.threads);
    text("winograd", static_cast<int>(p.winograd));
  }
  const Selection& selection = current_selection();
  if (selection.backend_forced) text("backend", name_of(selection.backend));
  return text.out.str();
}

void load_once(int device) {
  const uint64_t bit = bit_of(device);
  if (choices().loaded.load(std::memory_order_relaxed) & bit) return;  // each call passes here
  PyObject* const function = load.load();
  if (function == nullptr || choices().loaded.fetch_or(bit) & bit) return;
  py::gil_scoped_acquire gil;
  const py::object index = steal(PyLong_FromLong(device));
  steal(PyObject_CallOneArg(function, index.ptr()));
}

std::string choice_for(int device, const std::string& key) {
  std::lock_guard<std::mutex> lock(choices().mutex);
  const auto of_device = choices().rows.find(device);
  if (of_device == choices().rows.end()) return {};
  const auto found = of_device->second.find(key);
  return found == of_device->second.end() ? std::string() : found->second;
}

void set_measured_row(int device, const std::string& key, const std::string& row) {
  std::lock_guard<std::mutex> lock(choices().mutex);
  if (row.empty()) {
    choices().rows[device].erase(key);
  } else {
    choices().rows[device][key] = row;
  }
  choices().any |= bit_of(device);
}

bool is_aligned(const Conv2dArgs& args) {
  const void* const tensors[] = {args.input, args.filter, args.grad, args.residual, args.out};
  return std::all_of(std::begin(tensors), std::end(tensors),
                     [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; });
}

// Of the rows that can run, those worth a measurement: none that is expected to take ten times as
// long as the best, and none that is only a kernel's judge.
std::vector<const Conv2dKernel*> contenders(const Conv2dKernel& row, const Conv2dProblem& p,
                                            const Conv2dArgs& args, const Device& device) {
  constexpr double kHopeless = 10;
  std::vector<Candidate> all;
  const auto& rows = kernel_table().conv2d;
  choose(rows, row.op, row.direction, p, device, current_selection(), &all);
  const bool gpu = device.type == Device::Type::kCuda;
  const double best = row.cost(p, device);
  std::vector<const Conv2dKernel*> found;
  for (const Candidate& candidate : all) {
    if (!candidate.reason.empty() || candidate.cost_us > kHopeless * best) continue;
    const auto named = [&](const Conv2dKernel& k) { return k.name == candidate.name; };
    const auto at = std::find_if(rows.begin(), rows.end(), named);
    if (at == rows.end() || (!gpu && at->backend != Backend::kCpu)) continue;
    if (!at->aligned || is_aligned(args)) found.push_back(&*at);
  }
  return found;
}

}  // namespace

const Conv2dKernel* measured_row(Direction direction, const Conv2dProblem& p,
                                 const at::Tensor& like) {
  const Selection& selection = current_selection();
  if (!selection.kernel.empty() || aten_is_forced()) return nullptr;
  load_once(index_of(like));
  if (!(choices().any & bit_of(index_of(like)))) return nullptr;
  const Device device = machine_of(like);
  const std::string name = choice_for(index_of(like), key_of(direction, p, device));
  if (name.empty()) return nullptr;
  Selection only = selection;
  only.kernel = name;
  const Conv2dKernel* row = choose(kernel_table().conv2d, "conv2d", direction, p, device, only);
  return row != nullptr && row->name == name ? row : nullptr;
}

const Conv2dKernel& settled_row(const Conv2dKernel& row, const Conv2dProblem& p,
                                const Conv2dArgs& args, const at::Tensor& like) {
  PyObject* const function = time_rows.load();
  if (!measuring || function == nullptr || row.op != "conv2d" ||
      !current_selection().kernel.empty())
    return row;
  const Device device = machine_of(like);
  const int index = index_of(like);
  const std::string key = key_of(row.direction, p, device);
  if (!choice_for(index, key).empty()) return row;
  const std::vector<const Conv2dKernel*> rows = contenders(row, p, args, device);
  if (rows.size() < 2) return row;

  c10::OptionalDeviceGuard guard(like.device());  // whose current stream the timer looks at
  py::gil_scoped_acquire gil;
  py::list names;
  for (const Conv2dKernel* each : rows) names.append(each->name);
  const py::cpp_function run([&](size_t i) {
    py::gil_scoped_release others;
    launch(*rows.at(i), p, args, like);
  });
  const py::object arguments = py::make_tuple(index, key, names, run);
  const py::object chosen = steal(PyObject_CallObject(function, arguments.ptr()));
  if (chosen.is_none()) return row;
  return *rows.at(chosen.cast<size_t>());
}

void bind_autotune(py::module_& m) {
  m.def("register_autotuning", [](const py::object& loads, const py::object& times) {
    load.store(loads.inc_ref().ptr());
    time_rows.store(times.inc_ref().ptr());
  });
  m.def("set_autotuning", [](bool on) { return measuring.exchange(on); });
  m.def("set_measured_row", &set_measured_row);
}

}  // namespace fastconv
