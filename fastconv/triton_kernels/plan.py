"""How a kernel asks to be launched. A row's plan is a pure function of the problem and the device:
it runs, is printed and is tested without a GPU, and what it says is what is compiled and launched.
"""

from typing import Any, NamedTuple


class Pointer(NamedTuple):
    """A pointer argument.

    ``name`` is a field of csrc/core's Args struct ("input", "filter", "out", ...) or a buffer of
    the plan's workspace; ``dtype`` is what it points to.
    """

    name: str
    dtype: str


class Descriptor(NamedTuple):
    """A tensor descriptor: what the TMA of sm_90 and newer copies blocks of. Its rows are
    contiguous, its base and the other strides multiples of 16 bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


class Step(int):
    """A stride, or a size that strides are made of: the compiler is told where it is 1 or a
    multiple of 4, 8 or 16, which is what accesses of 16 bytes need. Plain integers are not
    specialised on, so that a new batch or image size compiles nothing."""


class Launch(NamedTuple):
    """One kernel launch."""

    kernel: Any  # a function under @triton.jit
    grid: tuple[int, ...]
    # In the kernel's order, before its constants: Pointer, Descriptor, Step, int or float.
    arguments: tuple
    constants: dict[str, Any]  # the kernel's tl.constexpr parameters
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None  # a thread; None: as the compiler thinks best


class Plan(NamedTuple):
    """The launches of one call, in order, and the bytes of each workspace buffer they share."""

    launches: tuple[Launch, ...]
    workspace: dict[str, int] = {}


class Row(NamedTuple):
    """A row of the kernel table, seen from Python. ``csrc/triton/table.cpp`` holds the rest of it:
    what it supports and what it is expected to cost."""

    name: str
    plan: Any  # (problem, device, config=None) -> Plan; the config is choose's unless given
    configs_for: Any  # (problem, device) -> tuple: the entries of its table that fit the problem
    dots: bool = False  # computes with tl.dot: its code must hold tensor-core instructions
