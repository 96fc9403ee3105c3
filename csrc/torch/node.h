// What the autograd files share. torch 2.13 to 2.15 hold a Node by intrusive_ptr, 2.11 and 2.12 by
// shared_ptr; NodePtr<N> is whichever this torch uses, read off the type of Edge::function.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <type_traits>
#include <utility>

#include "torch/arguments.h"
#include "torch/selection.h"

namespace fastconv {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using TorchNodePtr = decltype(torch::autograd::Edge::function);

namespace detail {
// Templates, so that the branch for the other torch is never instantiated.
template <class N, class Ptr>
struct NodeMaker;
template <class N, class T>
struct NodeMaker<N, std::shared_ptr<T>> {
  using type = std::shared_ptr<N>;
  // Found by its argument's type, since newer torch has no such function.
  static type make() {
    return type(new N(), [](T* node) { deleteNode(node); });
  }
};
template <class N, class T>
struct NodeMaker<N, c10::intrusive_ptr<T>> {
  using type = c10::intrusive_ptr<N>;
  static type make() { return c10::make_intrusive<N>(); }
};
}  // namespace detail

template <class N>
using NodePtr = typename detail::NodeMaker<N, TorchNodePtr>::type;

// A base for our nodes: remembers what backend(...), kernel(...) and their like said in forward,
// because backward runs on other threads and after the with-block has ended.
struct FastconvNode : torch::autograd::Node {
  Selection selection = current_selection();

  variable_list apply(variable_list&& grads) final {
    SelectionGuard guard(selection);
    // Forward has cast what was to be cast; backward computes in those types, autocast or not.
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (!grads[0].defined()) return variable_list(num_outputs());
    return backward(grads[0]);
  }
  // grad is defined; the result has one entry for each edge given to make_node.
  virtual variable_list backward(const at::Tensor& grad) = 0;
  bool wants(size_t edge) const { return task_should_compute_output(edge); }
};

// A node whose edges lead to `inputs`, in their order, or null when none requires a gradient.
template <class N, class... Tensors>
NodePtr<N> make_node(const Tensors&... inputs) {
  if (!torch::autograd::compute_requires_grad(inputs...)) return nullptr;
  auto node = detail::NodeMaker<N, TorchNodePtr>::make();
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  return node;
}

template <class N>
void set_history(const at::Tensor& out, const N& node) {
  if (node) torch::autograd::set_history(out, node);
}

inline SavedVariable save(const at::Tensor& t) { return SavedVariable(t, /*is_output=*/false); }

// A tensor that may be absent, kept until backward.
class SavedTensor {
 public:
  void keep(const OptionalTensor& t) {
    kept_ = t.has_value();
    if (kept_) variable_ = save(*t);
  }
  OptionalTensor unpack() const {
    return kept_ ? OptionalTensor(variable_.unpack()) : OptionalTensor();
  }
  void reset() { variable_.reset_data(); }

 private:
  bool kept_ = false;
  SavedVariable variable_;
};

// Forward-mode derivatives are computed or refused, never dropped: a node alone would yield zeros.
inline bool has_tangent(const at::Tensor& t) {
  return t.defined() && t._fw_grad(/*level=*/0).defined();
}
inline bool has_tangent(const std::optional<at::Tensor>& t) { return t && has_tangent(*t); }
template <class... Tensors>
bool any_tangent(const Tensors&... tensors) {
  return (has_tangent(tensors) || ...);
}

}  // namespace fastconv
