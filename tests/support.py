"""How tests choose what to run and judge what came out; see references.py for the right answers."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import subprocess
import sys
import textwrap
import zlib
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import fastconv
import references
from fastconv import triton_kernels
from fastconv.benchmarking.shapes import ConvShape
from turns import EVERYTHING, interpreted

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
LAYOUT_PAIRS = [(a, b) for a in FORMATS for b in FORMATS]  # of input and filter

FEW, DRAWS = 256, 4  # see ConvCase.peer_error

# What a run of the tests has covered; conftest prints it at the end.
coverage: Counter[str] = Counter()
# The emulated rows that have given a result; see test_emulator.py.
emulated_rows_run: set[str] = set()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Backend:
    name: str
    device: str

    def __str__(self):
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"


@functools.cache
def emulator_missing() -> str:
    """Empty when the CUDA kernels can be run on the CPU here (compiled now, if they have changed),
    otherwise why not."""
    missing = fastconv.emulator.available()
    if not missing:
        fastconv.emulator.load()
    elif os.environ.get("FASTCONV_REQUIRE_EMULATOR"):
        raise RuntimeError(f"FASTCONV_REQUIRE_EMULATOR is set, but {missing}")
    return missing


@functools.cache
def triton_missing() -> str:
    """Empty when the Triton kernels run here, on a GPU or by the interpreter, otherwise why not."""
    missing = triton_kernels.available()
    if missing and os.environ.get("FASTCONV_REQUIRE_TRITON"):
        raise RuntimeError(f"FASTCONV_REQUIRE_TRITON is set, but {missing}")
    if not missing and os.environ.get("TRITON_INTERPRET") == "1":
        from fastconv.triton_kernels import interpreter

        interpreter.check_overflow = False  # half of its time: run_row says where it is worth it
    return missing


def table() -> list:
    """The rows of the kernel table that this machine can run, or AddressSanitizer watches."""
    here = {"emulator"} if SANITIZED else {backend.name for backend in backends()}
    return [row for row in fastconv.kernels() if row.backend in here and runs_here(row)]


def runs_here(row) -> bool:
    capability = torch.backends.cpu.get_cpu_capability()
    if row.arch == "avx512":
        return capability.startswith("AVX512")
    if row.arch == "avx2":
        return capability.startswith("AVX")
    if row.arch.startswith("sm_") and row_device(row) == "cuda":
        major, minor = torch.cuda.get_device_capability()
        needed = int(row.arch[3:].rstrip("a"))
        here = 10 * major + minor
        return needed == here if row.arch.endswith("a") else needed <= here
    return True


@functools.cache
def backends() -> tuple[Backend, ...]:
    """Those that can run here. The one list: a new backend is picked up by every test."""
    emulated = not emulator_missing()
    compiled = {row.backend for row in fastconv.kernels()}
    gpu = torch.cuda.is_available()
    triton = not triton_missing()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    candidates = (
        (Backend("cpu", "cpu"), "cpu" in compiled),
        (Backend("aten", "cpu"), True),
        (Backend("emulator", "cpu"), emulated),
        (Backend("triton", "cpu"), triton and interpreted),
        (Backend("triton", "cuda"), triton and gpu and not interpreted),
        (Backend("cuda", "cuda"), "cuda" in compiled and gpu),
        (Backend("aten", "cuda"), gpu),
    )
    return tuple(backend for backend, runs in candidates if runs)


def rows(op: str, direction: str) -> list:
    return [row for row in table() if row.op == op and row.direction == direction]


def row_device(row) -> str:
    return next(b.device for b in backends() if b.name == row.backend)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def to_tf32(t: torch.Tensor) -> torch.Tensor:
    """float32 rounded to TF32's 10 bits, ties away from zero: half a unit of the last of them is
    added to the magnitude."""
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def max_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference from a float64 reference; infinite when shapes differ."""
    if actual.shape != reference.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    difference = (actual.detach().double().cpu() - reference.detach()).abs().max().item()
    return difference if difference == difference else float("inf")


def is_rough(row) -> bool:
    """Winograd's F(4x4, 3x3): up to 16 times PyTorch's error, and integers only nearly. What else
    tests must know of such a row stands here."""
    return row is not None and "_winograd4_" in row.name


def contract_failure(actual, reference, peer_error: float, row=None) -> str:
    """Empty when error <= 2 x PyTorch's own + eps(dtype) * max|reference|, both against float64;
    16 x where the row is rough."""
    largest = reference.abs().max().item() if reference.numel() else 0.0
    allowed = (16 if is_rough(row) else 2) * peer_error + eps(actual.dtype) * largest
    error = max_error(actual, reference)
    if error <= allowed:
        return ""
    shapes = f"{tuple(actual.shape)} for {tuple(reference.shape)}"
    return f"error {error:.3g} > {allowed:.3g} (PyTorch's {peer_error:.3g}; shape {shapes})"


def assert_contract(actual, reference, peers) -> None:
    failure = contract_failure(actual, reference, max(max_error(p, reference) for p in peers))
    assert not failure, failure


def exact_failure(actual: torch.Tensor, reference: torch.Tensor) -> str:
    """Empty when every element is the float64 reference, rounded once."""
    expected = reference.detach().to(actual.dtype)
    actual = actual.detach().cpu()
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    wrong = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    if not wrong.any():
        return ""
    where = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements differ, first at {where}: "
        f"{actual[where].item()} for {expected[where].item()}"
    )


def integers_failure(row, actual: torch.Tensor, reference: torch.Tensor) -> str:
    """exact_failure of a result whose exact value is a multiple of 1/4; a rough row's is rounded to
    the nearest one first."""
    return exact_failure((4 * actual).round() / 4 if is_rough(row) else actual, reference)


def assert_exact(actual, reference) -> None:
    failure = exact_failure(actual, reference)
    assert not failure, failure


def assert_same_format(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Strides agree wherever a dimension has more than one element to step over."""
    assert actual.shape == expected.shape
    steps = [i for i, n in enumerate(actual.shape) if n > 1]
    if actual.numel():
        got, wanted = ([t.stride(i) for i in steps] for t in (actual, expected))
        assert got == wanted, f"strides {actual.stride()}, torch's {expected.stride()}"


def integers(shape, generator, low=-2, high=2, dtype=torch.float64):
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def normal(shape, generator, dtype=torch.float64):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class ConvCase:
    """Inputs of one convolution in one dtype, with float64 answers and PyTorch's own errors."""

    def __init__(self, shape: ConvShape, kind: str, dtype: torch.dtype, seed: int = 0):
        self.shape, self.kind, self.dtype, self.seed = shape, kind, dtype, seed
        generator = torch.Generator().manual_seed(sum(shape.input + shape.weight) + seed)
        make = integers if kind == "integers" else normal
        self.input = make(shape.input, generator).to(dtype)
        self.weight = make(shape.weight, generator).to(dtype)
        self.bias = make((shape.K,), generator).to(dtype)
        self.grad = make(shape.output, generator).to(dtype)

    @functools.cached_property
    def reference(self) -> dict[str, torch.Tensor]:
        x, w, b, grad = (t.double() for t in (self.input, self.weight, self.bias, self.grad))
        if self.dtype is torch.float64 and self.kind == "normal":
            return references.conv2d_extended(x, w, b, grad, **self.shape.options)
        answers = {"fprop": references.conv2d(x, w, b, **self.shape.options)}
        gradients = references.conv2d_gradients(x, w, grad, **self.shape.options)
        return answers | dict(zip(("dgrad", "wgrad", "bgrad"), gradients, strict=True))

    @functools.cached_property
    def peer_error(self) -> dict[str, float]:
        """The larger of the errors of torch's two layouts. One draw of few elements may come out
        right by luck: where a result has less than 256, the worst of four draws counts."""
        errors = dict.fromkeys(self.reference, 0.0)
        for layout in FORMATS:
            for direction, got in run_conv(F.conv2d, self, layout, layout).items():
                errors[direction] = max(
                    errors[direction], max_error(got, self.reference[direction])
                )
        few = [d for d, t in self.reference.items() if 0 < t.numel() < FEW]
        for seed in range(1, DRAWS) if few and self.seed == 0 else ():
            other = ConvCase(self.shape, self.kind, self.dtype, seed).peer_error
            errors |= {d: max(errors[d], other[d]) for d in few}
        return errors


@functools.cache
def conv_case(shape: ConvShape, kind: str, dtype: torch.dtype) -> ConvCase:
    return ConvCase(shape, kind, dtype)


def run_conv(function, case: ConvCase, input_layout, filter_layout, want=None, device="cpu"):
    """fprop and the three gradients through autograd, or those named in `want`."""
    want = ("fprop", "dgrad", "wgrad", "bgrad") if want is None else want
    formats = (FORMATS[input_layout], FORMATS[filter_layout])
    # A copy, so that the strides of sizes of one follow the format too.
    x, w = (
        torch.empty_like(t, device=device, memory_format=f).copy_(t)
        for t, f in zip((case.input, case.weight), formats, strict=True)
    )
    b = case.bias.to(device).clone()
    wanted = [
        t.requires_grad_() for t, d in ((x, "dgrad"), (w, "wgrad"), (b, "bgrad")) if d in want
    ]
    out = function(x, w, b, **case.shape.options)
    results = {"fprop": out}
    if wanted:
        grad = torch.empty_like(case.grad, device=device, memory_format=formats[0])
        gradients = torch.autograd.grad(out, wanted, grad.copy_(case.grad))
        names = [d for d in ("dgrad", "wgrad", "bgrad") if d in want]
        results |= dict(zip(names, gradients, strict=True))
    return {d: t for d, t in results.items() if d in want}


def outcome(function, *args, **kwargs):
    """(result, None) or (None, exception)."""
    try:
        return function(*args, **kwargs), None
    except Exception as error:
        return None, error


def run_python(code: str, timeout: float = 120, **environment) -> subprocess.CompletedProcess:
    """Runs code in a process of its own: for what may end the process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
        check=False,
    )


SEEDS = (0, 1, 2)
# AddressSanitizer watches the kernels, which makes them several times slower still: one schedule.
SANITIZED = os.environ.get("FASTCONV_EMULATOR_SANITIZE", "0") not in ("", "0")


def seeds() -> tuple[int, ...]:
    """Schedules that the running test shows an emulated kernel: all three in float32, on tensor
    cores in float32 and NHWC of integers (random numbers meet the same barriers), and where
    FASTCONV_EVERY_SEED is set (`make test-all`), else one that its name decides."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" ", 1)[0]
    slow = TENSOR_CORES.search(test)
    telling = "integers_are_exact[float32-NHWC-NHWC" if slow else "float32"
    if EVERYTHING or (telling in test and not SANITIZED):
        return SEEDS
    return (SEEDS[zlib.crc32(test.encode()) % len(SEEDS)],)


# Rows whose blocks, of up to 384 threads, the emulator takes long to run.
TENSOR_CORES = re.compile(r"(igemm|conv1x1)_sm(80|90)_\w+_emulated")


def is_slow(row) -> bool:
    """Whether tests leave out what another test of the row shows."""
    return interpreted(row) or bool(TENSOR_CORES.search(row.name) and not EVERYTHING)


def shapes_for(row, dtype, layouts, shapes):
    """Of `shapes` those that a row is shown: every fourth where it is slow and others are shown
    the rest. Interpreted, float32 shows each place and other dtypes change conversions; on tensor
    cores float16 takes bfloat16's way, and tensors of mixed layouts are copied into one."""
    if interpreted(row):
        return shapes[:: 4 if dtype is not torch.float32 else 1 + (layouts[0] != layouts[1])]
    if is_slow(row):
        if SANITIZED:
            return shapes[::5]
        return shapes[:: 4 if dtype is torch.float16 or layouts[0] != layouts[1] else 1]
    return shapes


def combinations(rows, dtypes, layouts, mixed_slow=True):
    """Test parameters (row, dtype, layouts): all, but for slow rows mixed layouts in float32 alone,
    or not at all. Layouts are strides or copies there, which know no dtype."""
    found = []
    for row, dtype, pair in itertools.product(rows, dtypes, layouts):
        mixed = mixed_slow and dtype is torch.float32
        if pair[0] == pair[1] or mixed or not is_slow(row):
            name = f"{name_of(dtype)}-{'-'.join(pair)}-{row.name}"
            found.append(pytest.param(row, dtype, pair, id=name))
    return found


def run_row(row, call):
    """The result of call(). An emulated row must give the same bits under every schedule: a missing
    barrier, or a sum whose order is luck, would not."""
    if interpreted(row):
        from fastconv.triton_kernels import interpreter

        # Half of its time goes into looking for overflows of indices, which know no dtype.
        test = os.environ.get("PYTEST_CURRENT_TEST", "")
        where = ("test_integers_are_exact[float32-NHWC-NHWC", "test_max_forward[float32-NHWC")
        interpreter.check_overflow = any(name in test for name in where)
    if row.backend != "emulator":
        return call()
    first, *others = seeds()
    with emulator_seed(first):
        result = call()
    emulated_rows_run.add(row.name)
    for seed in others:
        with emulator_seed(seed):
            assert same_bits(result, call()), f"{row.name}: seed {seed} gives other bits"
    return result


def forced(row, call):
    """(result, "") of call() with this row alone; (None, reason) where the row says it cannot."""
    try:
        with fastconv.kernel(row.name):
            return run_row(row, call), ""
    except RuntimeError as error:
        pattern = rf"kernel {re.escape(row.name)} is forced and cannot run .*?"
        pattern += rf"{re.escape(row.name)}: ([^;]+)"
        found = re.search(pattern, str(error), re.DOTALL)
        if found is None:
            raise
        return None, found[1]


@contextlib.contextmanager
def emulator_seed(value: int):
    fastconv.emulator.seed(value)
    try:
        yield
    finally:
        fastconv.emulator.seed(0)


def bits(t: torch.Tensor) -> torch.Tensor:
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    return t.detach().contiguous().view(integers[t.element_size()])


def same_bits(a, b) -> bool:
    """Tensors of the same bits, or containers of such."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(bits(a), bits(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b


ACTIVATIONS = {
    None: lambda z: z,
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
}


def unfused(layer):
    """torch.nn's parts with the layer's parameters, as a function of (input, residual)."""
    conv, bn = layer.conv, layer.bn
    parts = (
        torch.nn.Conv2d(
            *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding),
            *(conv.dilation, conv.groups, conv.bias is not None),
        ),
        torch.nn.BatchNorm2d(
            *(bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats)
        ),
    )
    for part, own in zip(parts, (conv, bn), strict=True):
        part.to(conv.weight).train(own.training)
        part.load_state_dict(own.state_dict())
    activation = ACTIVATIONS[layer.activation]

    def forward(x, residual=None):
        z = parts[1](parts[0](x))
        return activation(z if residual is None else z + residual)

    forward.parts = torch.nn.ModuleList(parts)
    return forward


def must_run(row, dtype: torch.dtype) -> bool:
    """Whether the row's columns leave it no excuse for refusing every shape of a dtype."""
    return dtype in row.dtypes and set(row.layouts) == set(FORMATS)


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
