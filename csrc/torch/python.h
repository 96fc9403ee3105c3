// Calls of Python that may come from any thread, and errors that find their way back.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

namespace fastconv {

// The Python error that is set, as torch carries one from any thread to the user: as itself.
[[noreturn]] inline void throw_python_error() {
  python_error error;
  error.persist();
  throw std::move(error);
}

inline pybind11::object steal(PyObject* made) {
  if (made == nullptr) throw_python_error();
  return pybind11::reinterpret_steal<pybind11::object>(made);
}

}  // namespace fastconv
