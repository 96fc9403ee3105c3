"""Triton's interpreter, repaired where it does not do what a GPU does.

Seen in Triton 3.6 to 3.9: bfloat16 is kept as its bits in uint16, and tl.dot multiplies those;
float32 is cut off, not rounded, to bfloat16. In 3.6, `range` over a run-time integer needs a NumPy
older than 2.4. The repairs hold while a kernel of ours runs, and only then.
"""

import contextlib
import dataclasses
import threading

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import TensorHandle, interpreter_builder

# The interpreter keeps the program's index in a global and patches triton.language while it runs.
_one_at_a_time = threading.RLock()


# Whether each sum and product of 32-bit integers is computed in 64 bits too and compared: half the
# interpreter's time. Worth switching off where the same index arithmetic has already been checked.
check_overflow = True


@contextlib.contextmanager
def repaired():
    """One thread at a time, with the repairs in place."""
    with _one_at_a_time, contextlib.ExitStack() as undo:
        options = dataclasses.replace(interpreter_builder.options, sanitize_overflow=check_overflow)
        _replace(undo, interpreter_builder, **_METHODS, options=options)
        _replace(undo, triton_interpreter, _patch_lang_tensor=_patch_tensor)
        # At each call of a device function Triton patches what it sees of the language, a hundred
        # functions and more. Once for all that any function of ours or Triton's sees is enough.
        undo.callback(triton_interpreter._patch_lang(_SeesAll).restore)
        _replace(undo, triton_interpreter, _patch_lang=_patch_nothing)
        yield


def _replace(undo: contextlib.ExitStack, owner, **values) -> None:
    """Sets attributes that `undo` sets back."""
    for name, value in values.items():
        if name in vars(owner):
            undo.callback(setattr, owner, name, vars(owner)[name])
        else:
            undo.callback(delattr, owner, name)
        setattr(owner, name, value)


class _SeesAll:
    """Stands for a function: Triton reads which of its modules are among the globals."""

    __globals__ = {"tl": tl, "core": tl.core}


def _patch_nothing(function):
    return triton_interpreter._LangPatchScope()


def _widen(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16's bits: they are its upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    """bfloat16's bits of float32, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _cast(source, target):
    to = target.scalar
    if source.dtype.scalar == tl.bfloat16 and to != tl.bfloat16:
        source = TensorHandle(_widen(source.data), tl.float32)
    elif to == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
        return TensorHandle(_narrow(source.data), to)
    return TensorHandle(source.data.astype(triton_interpreter._get_np_dtype(to)), to)


def _dot(a, b, total, input_precision, max_num_imprecise_acc):
    a, b = (_cast(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    product = np.matmul(a.data, b.data, dtype=total.data.dtype)
    return TensorHandle(product + total.data, total.dtype.scalar)


_METHODS = {"cast_impl": _cast, "create_dot": _dot}
_patch_tensor_before = triton_interpreter._patch_lang_tensor


def _patch_tensor(tensor, scope):
    _patch_tensor_before(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
