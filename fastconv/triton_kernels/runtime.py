"""Compiles and launches what a plan asks for, on a GPU or by Triton's interpreter.

A launch goes past ``kernel[grid](...)``, which looks at every argument at every call: the plan
already knows their types and what may be assumed of them. What is compiled is the same
``ASTSource`` that :func:`compile_for` gives to a test on a machine without a GPU.
"""

import ctypes
import functools
import itertools
from operator import itemgetter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastconv.triton_kernels.plan import Descriptor, Launch, Plan, Pointer, Step
from fastconv.triton_kernels.problem import INTERPRETED, Device

interpreted = triton.knobs.runtime.interpret

_TRITON_NAMES = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "uint8": "u8",
    "int32": "i32",
    "int64": "i64",
}


@functools.cache
def device_of(index: int) -> Device:
    """The GPU of that index, as plans see it; the interpreter plans as for an H200."""
    if interpreted:
        return INTERPRETED
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch, shared = properties.gcnArchName.split(":")[0], 65536
        return Device("hip", arch, properties.multi_processor_count, shared, properties.warp_size)
    return Device(
        "cuda",
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.warp_size,
    )


# --- compiling ------------------------------------------------------------------------------------


def _specialise(argument, aligned: bool):
    """(type, constant or None, what it may be assumed to be a multiple of) of an argument."""
    if isinstance(argument, Pointer):
        return "*" + _TRITON_NAMES[argument.dtype], None, 16 if aligned else 1
    if isinstance(argument, Descriptor):
        block = ", ".join(map(str, argument.block))
        return f"tensordesc<{_TRITON_NAMES[argument.dtype]}[{block}]>", None, 1
    if isinstance(argument, float):
        return "fp32", None, 1
    if isinstance(argument, Step) and argument == 1:
        return "constexpr", 1, 1
    kind = "i32" if -(2**31) <= argument < 2**31 else "i64"
    if not isinstance(argument, Step):
        return kind, None, 1
    # 16 bytes are 4, 8 or 16 elements; Triton's own launcher would tell of 16 alone.
    return kind, None, next((n for n in (16, 8, 4) if argument % n == 0), 1)


def source_of(launch: Launch, aligned: bool = True) -> ASTSource:
    """What Triton compiles for a launch; `aligned` tells it that pointers are multiples of 16."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    for i, argument in enumerate(launch.arguments):
        name = launch.kernel.arg_names[i]
        signature[name], constant, multiple = _specialise(argument, aligned)
        if constant is not None:
            constants[name] = constant
        if multiple > 1:
            attributes[(i,)] = [["tt.divisibility", multiple]]
    signature |= dict.fromkeys(launch.kernel.arg_names[len(launch.arguments) :], "constexpr")
    return ASTSource(launch.kernel, signature, constants, attributes)


def _options(launch: Launch) -> dict:
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }
    return options | ({"maxnreg": launch.max_registers} if launch.max_registers else {})


def compile_for(launch: Launch, device: Device, aligned: bool = True):
    """Triton's CompiledKernel of a launch, for a device that need not be here."""
    target = GPUTarget(device.backend, device.arch, device.warp_size)
    return triton.compile(source_of(launch, aligned), target=target, options=_options(launch))


# --- launching ------------------------------------------------------------------------------------

_kernels: dict[tuple, Any] = {}


def _compiled(launch: Launch, index: int, aligned: bool):
    """The launch's kernel, loaded into a GPU: compiled once a process; Triton keeps its own cache
    on disk. What is compiled depends on the arguments' types, not on a size that is no Step."""
    types = tuple(_specialise(a, aligned) for a in launch.arguments)
    constants = tuple((name, type(value), value) for name, value in launch.constants.items())
    key = launch.kernel, types, constants, tuple(_options(launch).items()), index
    if key not in _kernels:
        kernel = compile_for(launch, device_of(index), aligned)
        kernel.run  # noqa: B018 - loads it into the current device, or says why it cannot
        _kernels[key] = kernel
    return _kernels[key]


class _Address:
    """A pointer as Triton's tensor descriptors take one."""

    def __init__(self, address: int, dtype: torch.dtype):
        self.address, self.dtype = address, dtype

    def data_ptr(self):
        return self.address


def _tensor_descriptor(d: Descriptor, base) -> TensorDescriptor:
    return TensorDescriptor(base, list(d.shape), list(d.strides), list(d.block))


def _maker_of(descriptor: Descriptor):
    """A function of an address. Triton checks what it is given in a few microseconds; allocators
    hand out the same few addresses again and again."""
    dtype = getattr(torch, descriptor.dtype)

    @functools.lru_cache(64)
    def make(address: int) -> TensorDescriptor:
        return _tensor_descriptor(descriptor, _Address(address, dtype))

    return make


class _Step:
    """A launch, compiled. One itemgetter puts in order what Triton's launcher takes: of a call come
    the stream and the addresses, in the order of `names`; the rest never changes."""

    def __init__(self, launch: Launch, names: tuple[str, ...], index: int, aligned: bool):
        self.kernel = _compiled(launch, index, aligned)
        self.run = self.kernel.run
        descriptors = [a for a in launch.arguments if isinstance(a, Descriptor)]
        self.descriptors = [(names.index(d.name), _maker_of(d)) for d in descriptors]
        made = itertools.count(len(names))
        fixed, order = [], []

        def always(value):
            order.append(len(names) + len(descriptors) + len(fixed))
            fixed.append(value)

        for size in (*launch.grid, 1, 1)[:3]:
            always(size)
        order.append(names.index(_STREAM))
        # No metadata and no hooks: see __call__.
        for value in (self.kernel.function, self.kernel.packed_metadata, None, None, None):
            always(value)
        for argument in launch.arguments:
            if isinstance(argument, Pointer):
                order.append(names.index(argument.name))
            elif isinstance(argument, Descriptor):
                order.append(next(made))
            else:
                always(float(argument) if isinstance(argument, float) else int(argument))
        for name in launch.kernel.arg_names[len(launch.arguments) :]:
            always(launch.constants[name])
        self.fixed, self.order = tuple(fixed), itemgetter(*order)

    def __call__(self, given: tuple) -> None:
        for place, make in self.descriptors:
            given += (make(given[place]),)
        arguments = self.order(given + self.fixed)
        enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
        # Triton would describe each launch to hooks that are not there: a third of its time.
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            grid, (stream, *kernel), values = arguments[:3], arguments[3:6], arguments[9:]
            metadata = self.kernel.launch_metadata(grid, stream, *values)
            arguments = (*grid, stream, *kernel, metadata, enter, leave, *values)
        self.run(*arguments)


_STREAM = "a stream"
_hooks = triton.knobs.runtime


def _layout_of(workspace: dict[str, int]) -> tuple[tuple[int, ...], int]:
    """Where each buffer begins in the one that holds them all, and how large that is."""
    ends = itertools.accumulate(-(-size // 128) * 128 for size in workspace.values())
    *offsets, total = 0, *ends
    return tuple(offsets), total


class Runner:
    """A plan ready to be launched on one GPU: a function of the addresses of `names`, in order.
    That GPU must be the current one, as it is under an operator's kernel."""

    def __init__(self, plan: Plan, names: tuple[str, ...], index: int, aligned: bool):
        self.index = index
        self.device = torch.device("cuda", index)
        self.offsets, self.workspace = _layout_of(plan.workspace)
        given = (_STREAM, *names, *plan.workspace)
        self.steps = tuple(_Step(launch, given, index, aligned) for launch in plan.launches)

    def __call__(self, addresses: tuple[int, ...]) -> None:
        given = (torch._C._cuda_getCurrentRawStream(self.index), *addresses)
        if self.workspace:
            # Given back at the end: what is put there next runs after these launches.
            buffer = torch.empty(self.workspace, dtype=torch.uint8, device=self.device)
            base = buffer.data_ptr()
            given += tuple([base + offset for offset in self.offsets])
        for step in self.steps:
            step(given)


def runner_of(plan: Plan, names: tuple[str, ...], index: int, aligned: bool):
    """What runs a plan on a GPU, or by the interpreter."""
    return InterpretedRunner(plan, names) if interpreted else Runner(plan, names, index, aligned)


# --- the interpreter ------------------------------------------------------------------------------


class InterpretedRunner:
    """The same on CPU tensors."""

    def __init__(self, plan: Plan, names: tuple[str, ...]):
        from fastconv.triton_kernels.interpreter import repaired  # needs NumPy

        self.launches, self.repaired = plan.launches, repaired
        self.names = (*names, *plan.workspace)
        self.offsets, self.workspace = _layout_of(plan.workspace)

    def __call__(self, addresses: tuple[int, ...]) -> None:
        buffer = torch.empty(self.workspace, dtype=torch.uint8)
        base = buffer.data_ptr()
        addresses = (*addresses, *(base + offset for offset in self.offsets))
        named = dict(zip(self.names, addresses, strict=True))
        with self.repaired():
            for launch in self.launches:
                arguments = [_interpreted_argument(a, named) for a in launch.arguments]
                launch.kernel[launch.grid](*arguments, **launch.constants)


def _interpreted_argument(argument, addresses):
    if isinstance(argument, Pointer):
        return _tensor_at(addresses[argument.name], argument.dtype)
    if isinstance(argument, Descriptor):
        return _tensor_descriptor(argument, _tensor_at(addresses[argument.name], argument.dtype))
    return float(argument) if isinstance(argument, float) else int(argument)


# An empty tensor's address is 0, which no torch.Tensor has. Nothing of it is read or written.
_NOWHERE = torch.empty(16, dtype=torch.uint8)


def _tensor_at(address: int, dtype: str) -> torch.Tensor:
    """One element at that address: the interpreter asks for a tensor's address and dtype alone."""
    dtype = getattr(torch, dtype)
    memory = (ctypes.c_byte * dtype.itemsize).from_address(address or _NOWHERE.data_ptr())
    return torch.frombuffer(memory, dtype=dtype)


def run_on(plan: Plan, tensors: dict[str, torch.Tensor]) -> None:
    """Runs a plan on tensors by name: for tests and for timing configurations."""
    addresses = tuple(t.data_ptr() for t in tensors.values())
    index = next(iter(tensors.values())).device.index or 0
    aligned = all(address % 16 == 0 for address in addresses)
    runner_of(plan, tuple(tensors), index, aligned)(addresses)
