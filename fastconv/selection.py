"""Which kernel runs: the table, the choice explained, and the ways to force it.

Everything here is per thread, as torch's grad mode is. What is forced in forward holds for the
backward of the same graph too, wherever and whenever that runs.
"""

import contextlib
import difflib
from typing import NamedTuple

import torch

from fastconv import _extension, emulator, triton_kernels
from fastconv.functional import as_ints, resolve_padding

BACKENDS = ("cuda", "triton", "cpu", "emulator", "aten")
WINOGRAD_MODES = ("fast", "accurate", "off")


class KernelInfo(NamedTuple):
    """One row of the kernel table."""

    name: str  # unique: operation_algorithm_architecture_direction
    # "conv2d", "conv2d_max_pool2d", "conv2d_statistics", "max_pool2d", "avg_pool2d",
    # "adaptive_avg_pool2d", "batch_norm"
    op: str
    direction: str  # "fprop", "dgrad", "wgrad", "bgrad" (the bias gradient)
    backend: str  # "cuda", "triton", "cpu", "emulator"
    arch: str  # the least it runs on: "portable", "avx2", "avx512", "sm_80", ...
    dtypes: tuple[torch.dtype, ...]
    layouts: tuple[str, ...]  # "NCHW", "NHWC"


def kernels() -> list[KernelInfo]:
    """The kernel table, in the order in which rows are considered.

    The emulator's rows, named as the CUDA rows with ``_emulated`` behind, stand in it from the
    first ``fastconv.backend("emulator")`` (or :func:`fastconv.emulator.load`) on.
    """
    return [
        KernelInfo(*columns, tuple(getattr(torch, d) for d in dtypes), tuple(layouts))
        for *columns, dtypes, layouts in _extension.load().kernels()
    ]


class Candidate(NamedTuple):
    """A row that was considered: ``reason`` says why it cannot run; None means that it can."""

    name: str
    reason: str | None
    cost_us: float | None  # the expected microseconds by which rows are compared


class Explanation(str):
    """What :func:`explain` returns: a text to print, with the facts as attributes."""

    kernel: str  # the row that runs, or "aten"
    backend: str
    candidates: tuple[Candidate, ...]


def explain(
    input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, direction="fprop"
) -> Explanation:
    """Says which kernel a convolution runs, and why each other row of the table does not.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as of
            :func:`fastconv.functional.conv2d`. Only shapes, dtypes, devices and memory formats are
            read; nothing is computed.
        direction: "fprop", "dgrad", "wgrad" or "bgrad".

    Returns:
        A string to print, whose ``kernel`` is the row's name ("aten" where no kernel of ours runs)
        and whose ``candidates`` list every row in table order.

    Raises:
        RuntimeError: for arguments that conv2d refuses.
        ValueError: for an unknown direction.
    """
    stride = as_ints("explain", "stride", stride)
    dilation = as_ints("explain", "dilation", dilation)
    input, padding = resolve_padding(input, weight, stride, padding, dilation)
    chosen, reason, rows = _extension.load().explain_conv2d(
        direction, input, weight, bias, stride, padding, dilation, groups
    )
    candidates = tuple(Candidate(n, why or None, None if why else cost) for n, why, cost in rows)
    lines = [
        f"conv2d {direction}, input {tuple(input.shape)}, weight {tuple(weight.shape)}, "
        f"{str(input.dtype).removeprefix('torch.')} on {input.device}",
        f"runs: {chosen}" + (f" ({reason})" if reason and (not rows or chosen != "aten") else ""),
    ]
    for candidate in candidates:
        if candidate.name == chosen:
            lines.append(f"  * {candidate.name}: chosen, expected {candidate.cost_us:.1f} us")
        elif candidate.reason is None:
            lines.append(f"    {candidate.name}: slower, expected {candidate.cost_us:.1f} us")
        else:
            lines.append(f"    {candidate.name}: {candidate.reason}")
    result = Explanation("\n".join(lines))
    result.kernel = chosen
    result.candidates = candidates
    result.backend = next((k.backend for k in kernels() if k.name == chosen), "aten")
    return result


def _close_matches(name, names):
    found = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(found)}?" if found else ""


class _Forced(contextlib.ContextDecorator):
    """Enters one change of the thread's selection and undoes it at the end; nests."""

    _position: int  # in the tuple (backend, kernel, allow_fallback, winograd)

    def __init__(self, value):
        self._value = value
        self._saved = []

    def _recreate_cm(self):
        return type(self)(self._value)  # a decorated function may run on several threads at once

    def __enter__(self):
        extension = _extension.load()
        saved = extension.get_selection()
        self._saved.append(saved)
        changed = list(saved)
        changed[self._position] = self._value
        extension.set_selection(*changed)
        return self

    def __exit__(self, *exception):
        _extension.load().set_selection(*self._saved.pop())


class backend(_Forced):
    """``with fastconv.backend("cpu"):`` runs every operation on that backend, or raises.

    Args:
        name: "cuda", "triton", "cpu", "emulator" or "aten" (PyTorch's own kernels).

    "emulator" runs the CUDA kernels on CPU tensors, slowly; :mod:`fastconv.emulator` compiles it on
    first use. "triton" takes CPU tensors, as slowly, where the environment says TRITON_INTERPRET=1
    when it is first asked for.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for a backend that this build, or this machine, has no kernel of.
    """

    _position = 0

    def __init__(self, name: str):
        if name not in BACKENDS:
            raise ValueError(
                f"backend must be one of {', '.join(BACKENDS)}, but got {name!r}"
                + _close_matches(name, BACKENDS)
            )
        if name == "emulator":
            emulator.load()
        if name == "triton":
            _load_triton()
        if name != "aten" and not any(k.backend == name for k in kernels()):
            raise RuntimeError(f"backend {name!r} is not available: {_why_absent(name)}")
        super().__init__(name)


def _load_triton():
    if why := triton_kernels.available():
        raise RuntimeError(f"backend 'triton' is not available: {why}")
    triton_kernels.load()


def _why_absent(name):
    if name == "cuda":
        return "this fastconv was built without CUDA"
    return f"this version of fastconv has no {name} kernels"


class kernel(_Forced):
    """``with fastconv.kernel("name"):`` runs that row of the table wherever it could be chosen.

    It binds the row's own operation and direction; all else is chosen as ever.

    Raises:
        ValueError: for a name that is not in :func:`kernels`.
        RuntimeError: for a Triton kernel where Triton cannot run.
    """

    _position = 1

    def __init__(self, name: str):
        if str(name).endswith("_emulated"):
            emulator.load()
        backends = {k.name: k.backend for k in kernels()}
        if name not in backends:
            raise ValueError(
                f"no kernel is named {name!r}"
                + _close_matches(name, backends)
                + " (fastconv.kernels() lists them)"
            )
        if backends[name] == "triton":
            _load_triton()
        super().__init__(name)


class _Setting(contextlib.ContextDecorator):
    """Changes one entry of the thread's selection from now on; as a block, until the block ends."""

    _position: int  # as _Forced's

    def __init__(self, value):
        self._previous = _extension.load().get_selection()[self._position]
        self._value = value
        self._set(value)

    def __enter__(self):
        self._set(self._value)  # once more: a decorated function enters again at each call
        return self

    def __exit__(self, *exception):
        self._set(self._previous)

    def _set(self, value):
        changed = list(_extension.load().get_selection())
        changed[self._position] = value
        _extension.load().set_selection(*changed)


class allow_fallback(_Setting):
    """``fastconv.allow_fallback(False)`` makes every fallback to ATen an error, from now on.

    As a ``with`` block it holds until the block ends. ``backend("aten")`` asks for ATen and stays
    permitted.
    """

    _position = 2

    def __init__(self, allowed: bool = True):
        super().__init__(bool(allowed))


class winograd(_Setting):
    """``fastconv.winograd("accurate")`` says which Winograd convolutions may run, from now on.

    As a ``with`` block it holds until the block ends. On the CPU, 3x3 convolutions with stride 1 in
    float32 and NHWC may run as Winograd's F(2x2, 3x3), with 2.25 times fewer multiplications, or as
    F(4x4, 3x3), with 4 times fewer.

    Args:
        mode: "fast", the default: F(4x4) in fused inference (``conv_bn_relu`` in eval mode where no
            gradient is asked for, and so networks after :func:`fastconv.fuse`), F(2x2) elsewhere;
            "accurate": F(2x2) alone; "off": neither. Each runs only where it is expected to be the
            fastest. A row that :class:`kernel` names runs in any mode.

    Largest error, as a share of the largest result, against float64 (inputs and weights normal,
    28x28 images for 16 and 64 channels and 14x14 for the others)::

        channels    direct    F(2x2)    F(4x4)    torch, channels_last
              16    4.2e-7    2.3e-7    9.8e-7    4.2e-7
              64    3.7e-7    3.5e-7    1.8e-6    9.0e-7
             256    3.9e-7    6.1e-7    2.9e-6    2.0e-6
             512    3.1e-7    6.4e-7    2.5e-6    2.6e-6

    F(2x2) gives small integers exactly; F(4x4), whose filters have ninths in them, does not. An
    output that an infinity, a NaN or an overflow on the way has spoilt is computed again directly;
    a finite number that dwarfs the rest costs the other outputs of its tile their precision.

    Raises:
        ValueError: for an unknown mode.
    """

    _position = 3

    def __init__(self, mode: str):
        if mode not in WINOGRAD_MODES:
            raise ValueError(
                f"winograd must be one of {', '.join(WINOGRAD_MODES)}, but got {mode!r}"
                + _close_matches(mode, WINOGRAD_MODES)
            )
        super().__init__(mode)
