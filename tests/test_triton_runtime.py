"""How a Triton plan is launched. On the way to a GPU a stub stands for the driver: what reaches it,
what is compiled, and how long that takes. With TRITON_INTERPRET=1 the kernels run, also under
torch.compile. What they compute is tested with all other rows."""

import os
import subprocess
import sys
import threading
import timeit
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastconv
import fastconv.functional as ff
from fastconv import _extension, triton_kernels
from fastconv.triton_kernels.problem import BatchNormProblem, Conv2dProblem, Device, Pool2dProblem

triton = pytest.importorskip("triton", minversion="3.6")

import triton.backends.nvidia.driver as nvidia  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.errors import OutOfResources  # noqa: E402

from fastconv.triton_kernels import runtime, table  # noqa: E402
from fastconv.triton_kernels.plan import Descriptor, Launch, Plan, Pointer, Step  # noqa: E402

compiled = pytest.mark.skipif(runtime.interpreted, reason="TRITON_INTERPRET=1")
interpreted = pytest.mark.skipif(not runtime.interpreted, reason="needs TRITON_INTERPRET=1")

GPU, STREAM, FUNCTION = 5, 0x57, 0xF0
H200 = Device()


class Launched:
    """What Triton's launcher hands to its part in C, by name. Its order has changed in 3.7."""

    def __init__(self, *arguments):
        self.grid, self.stream, self.function = arguments[:3], arguments[3], arguments[4]
        if hasattr(nvidia, "make_launcher"):
            self.metadata, self.enter, self.leave = arguments[10:13]
            self.values = arguments[13:]
        else:
            self.metadata, self.enter, self.leave = arguments[8:11]
            annotations, signature, self.values = arguments[13:]
            assert len(annotations) == len(self.values)
            assert sum(a.type == "kernel" for a in annotations) == len(signature)


class StubUtils:
    """Stands for Triton's module in C."""

    def __init__(self, log):
        self.log = log
        self.launch = lambda *arguments: self.log(Launched(*arguments))

    def load_binary(self, name, binary, shared, device):
        return "module", FUNCTION, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": H200.shared_memory}

    def build_signature_metadata(self, signature):
        return bytes(len(signature))

    def fill_tma_descriptor(self, address, *rest):
        return "map", address

    fill_tma_descriptor_tiled = fill_tma_descriptor


@pytest.fixture
def driver(monkeypatch):
    """A driver under Triton's own launcher; ``driver.calls`` is what it is asked to launch."""
    calls = []
    stub = SimpleNamespace(
        calls=calls,
        utils=StubUtils(calls.append),
        launcher_cls=nvidia.CudaLauncher,
        get_current_device=lambda: GPU,
        get_current_stream=lambda index: STREAM,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        allocate_default_profile_scratch=None,
    )
    if hasattr(nvidia, "make_launcher"):
        module = SimpleNamespace(launch=stub.utils.launch)
        monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **_: module)
        monkeypatch.setattr(nvidia, "library_dirs", list)
    else:
        monkeypatch.setattr(nvidia, "PyKernelArg", SimpleNamespace)
        monkeypatch.setattr(nvidia, "ARG_KERNEL", "kernel")
        monkeypatch.setattr(nvidia, "ARG_CONSTEXPR", "constexpr")
    monkeypatch.setattr(triton.runtime.driver, "_active", stub)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM, raising=False)
    monkeypatch.setattr(runtime, "device_of", lambda index: H200)
    monkeypatch.setattr(runtime, "_kernels", {})
    scale_kernel.device_caches.clear()
    yield stub
    for kernel in (*runtime._kernels.values(), *kernels_of_triton()):
        kernel.module = None  # which Triton would unload by another driver


def kernels_of_triton():
    """What ``scale_kernel[grid](...)`` has compiled."""
    caches = [first for first, *_ in scale_kernel.device_caches.values()]
    return [kernel for cache in caches for kernel in cache.values()]


@triton.jit
def scale_kernel(source, sums, out, n, step, inner, factor, BLOCK: tl.constexpr, ON: tl.constexpr):
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * step * inner
    x = tl.load(source + i, mask=i < n)
    if ON:
        tl.store(sums + i, x, mask=i < n)
    tl.store(out + i, x * factor, mask=i < n)


@triton.jit
def copy_kernel(source, out, n, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    if row < n:
        out.store([row, 0], source.load([row, 0]))


def scale_plan(n=1000, step=32, workspace="sums"):
    pointers = (Pointer("input", "float32"), Pointer(workspace, "float32"))
    launch = Launch(
        scale_kernel,
        (4, 2),
        (*pointers, Pointer("out", "float32"), n, Step(step), Step(1), 0.5),
        {"ON": True, "BLOCK": 64},
    )
    return Plan((launch,), {} if workspace == "out" else {"unused": 5, workspace: 4 * n})


def copy_plan(n=64):
    rows = [Descriptor(name, "float16", (n, 64), (64, 1), (16, 64)) for name in ("input", "out")]
    return Plan((Launch(copy_kernel, (n // 16,), (*rows, n), {"ROWS": 16}),))


@pytest.fixture
def buffers(monkeypatch):
    """The workspaces that were allocated, on the CPU; entries vanish with them."""
    made = []

    def empty(size, dtype, device):
        assert device == torch.device("cuda", GPU)
        tensor = allocate(size, dtype=dtype)
        made.append(weakref.ref(tensor))
        return tensor

    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", empty)
    return made


# What reaches the driver


@compiled
def test_arguments_arrive_in_the_kernels_order(driver, buffers):
    run = runtime.Runner(scale_plan(), ("out", "grad", "input"), GPU, True)
    alive = []
    driver.utils.log = lambda call: alive.append((call, buffers[-1]().data_ptr()))
    run((0x1000, 0, 0x2000))
    ((call, workspace),) = alive
    assert call.grid == (4, 2, 1) and call.stream == STREAM and call.function == FUNCTION
    sums = workspace + 128  # behind the other buffer, and aligned
    assert tuple(call.values) == (0x2000, sums, 0x1000, 1000, 32, 1, 0.5, 64, True)
    assert (call.metadata, call.enter, call.leave) == (None, None, None)
    assert {type(v) for v in call.values} == {int, float, bool}
    run((0x3000, 0, 0x4000))
    assert alive[1][0].values[:3:2] == call.values[:0] + type(call.values)((0x4000, 0x3000))
    assert [ref() for ref in buffers] == [None, None]


@compiled
def test_triton_itself_passes_the_same(driver):
    runtime.Runner(scale_plan(workspace="out"), ("input", "out"), GPU, True)((256, 512))
    tensors = [torch.empty(1000) for _ in range(2)]
    scale_kernel[4, 2](tensors[0], tensors[1], tensors[1], 1000, 32, 1, 0.5, BLOCK=64, ON=True)
    ours, theirs = driver.calls
    assert (ours.grid, ours.stream, ours.function) == (theirs.grid, theirs.stream, theirs.function)
    addresses = {id(tensors[0]): 256, id(tensors[1]): 512}
    assert [addresses.get(id(v), v) for v in theirs.values] == list(ours.values)


@compiled
def test_descriptors(driver):
    run = runtime.Runner(copy_plan(), ("input", "out"), GPU, True)
    run((0x100, 0x200))
    run((0x100, 0x300))
    sizes = [64, 64, 64, 1]
    expected = [[("map", 0x100), *sizes, ("map", out), *sizes, 64, 16] for out in (0x200, 0x300)]
    assert [list(call.values) for call in driver.calls] == expected


@compiled
def test_hooks_are_told_what_triton_tells_them(driver):
    def hook(metadata):
        pass

    run = runtime.Runner(scale_plan(workspace="out"), ("input", "out"), GPU, True)
    run((256, 512))
    knobs = triton.knobs.runtime
    knobs.launch_enter_hook.add(hook)
    try:
        run((256, 512))
        tensor = torch.empty(1000)
        scale_kernel[4, 2](tensor, tensor, tensor, 1000, 32, 1, 0.5, BLOCK=64, ON=True)
    finally:
        knobs.launch_enter_hook.remove(hook)
    silent, ours, theirs = driver.calls
    assert silent.enter is None
    assert (ours.enter, ours.leave) == (theirs.enter, theirs.leave)
    assert ours.metadata.get() == theirs.metadata.get()
    assert ours.values == silent.values


@compiled
def test_threads_do_not_mix_their_calls(driver):
    run = runtime.Runner(copy_plan(), ("input", "out"), GPU, True)
    work = [
        threading.Thread(target=lambda i=i: [run((16 * i, 16 * i)) for _ in range(200)])
        for i in range(1, 9)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    pairs = [(call.values[0][1], call.values[5][1]) for call in driver.calls]
    assert sorted(pairs) == sorted((16 * i, 16 * i) for i in range(1, 9) for _ in range(200))


# What is compiled


@pytest.fixture
def compilations(driver, monkeypatch):
    """The launches that were compiled, by nothing that takes time."""
    log = []

    def compile_for(launch, device, aligned):
        log.append(launch)
        return SimpleNamespace(run=lambda *arguments: None, function=0, packed_metadata=())

    monkeypatch.setattr(runtime, "compile_for", compile_for)
    return log


def problem_for(row):
    """One that the row takes."""
    if row.startswith("batch_norm"):
        return BatchNormProblem(8, 64, 28, 28)
    if "pool2d" in row:
        kind = {"max": "max", "avg": "average", "adaptive": "adaptive_average"}[row.split("_")[0]]
        index = "uint8" if kind == "max" else "none"
        return Pool2dProblem(kind, 8, 64, 28, 28, 14, 14, 2, 2, 2, 2, index=index)
    layout = "NHWC" if "tma" in row else "NCHW"
    problem = Conv2dProblem(8, 64, 28, 28, 64, 3, 3, 1, 1, 1, 1, statistics="statistics" in row)
    problem = problem._replace(layout=layout, filter_layout=layout)
    if "1x1" in row:
        return problem._replace(R=1, S=1, pad_h=0, pad_w=0)
    return problem._replace(G=64) if "depthwise" in row else problem


@compiled
@pytest.mark.parametrize("row", table.ROWS)
def test_other_batches_compile_next_to_nothing(compilations, row):
    """Where sums over many more elements are split, one more variant of a launch or two."""
    problem = problem_for(row)
    config = table.ROWS[row].configs_for(problem, H200)[0]
    table.configured_runner(row, problem, GPU, config)
    launches = len(compilations)
    assert launches
    table.configured_runner(row, problem._replace(N=7), GPU, config)
    assert len(compilations) == launches
    for N in (9, 16, 24, 32, 100, 128, 1000):
        table.configured_runner(row, problem._replace(N=N), GPU, config)
    assert len(compilations) <= launches + 2


@compiled
def test_what_the_compiler_may_assume_is_compiled_anew(compilations):
    def count(plan, aligned=True, index=GPU):
        before = len(compilations)
        runtime.Runner(plan, ("input", "out"), index, aligned)
        return len(compilations) - before

    assert count(scale_plan(1000)) == 1
    assert count(scale_plan(1001)) == count(scale_plan(1)) == count(scale_plan(step=48)) == 0
    assert count(scale_plan(step=1)) == count(scale_plan(step=7)) == 1
    assert count(scale_plan(step=9)) == 0
    assert count(scale_plan(), aligned=False) == 1
    assert count(scale_plan(2**31)) == 1  # 64 bits
    assert count(scale_plan(), index=GPU + 1) == 1  # a module belongs to one GPU
    (launch,) = scale_plan().launches
    assert count(Plan((launch._replace(num_warps=8),), {"sums": 4})) == 1
    assert count(Plan((launch._replace(constants={"BLOCK": 64, "ON": 1}),), {"sums": 4})) == 1


@compiled
@pytest.mark.parametrize("error", [OutOfResources(1, 2, "shared memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["compiling", "loading"])
def test_what_fails_is_not_kept(driver, buffers, monkeypatch, error, where):
    def fail(*arguments, **options):
        raise error

    def launch():
        triton_kernels.launch(row, tuple(problem), tuple(range(0, 16 * len(names), 16)), GPU)

    row = next(row for row in table.ROWS if "bgrad" in row)
    problem = problem_for(row)
    names = _extension.load().triton_fields()["conv2d"][1]
    monkeypatch.setattr(triton_kernels, "_runners", {})
    monkeypatch.setattr(triton_kernels, "load", lambda: None)
    monkeypatch.setenv("FASTCONV_AUTOTUNE", "0")
    with monkeypatch.context() as broken:
        if where == "compiling":
            broken.setattr(triton, "compile", fail)
        else:
            broken.setattr(driver.utils, "load_binary", fail)
        for _ in range(2):
            with pytest.raises(type(error)):
                launch()
    assert not triton_kernels._runners and not runtime._kernels
    launch()
    assert driver.calls


# Microseconds


@compiled
def test_a_launch_takes_little_of_the_host(driver):
    """Python's part of it, as Triton's own: without the part in C."""
    ours = runtime.Runner(scale_plan(workspace="out"), ("input", "out"), GPU, True)
    x, y = (torch.empty(1000) for _ in range(2))
    calls = {
        "ours": lambda: ours((256, 512)),
        "Triton's": lambda: scale_kernel[4, 2](x, y, y, 1000, 32, 1, 0.5, BLOCK=64, ON=True),
    }
    calls["Triton's"]()
    for kernel in (ours.steps[0].kernel, *kernels_of_triton()):
        kernel.run.launch = lambda *arguments: None
    times = {name: min(timeit.repeat(f, number=500, repeat=9)) * 2000 for name, f in calls.items()}
    print(", ".join(f"{name} {us:.1f} us" for name, us in times.items()))
    # A busy machine slows both.
    assert times["ours"] < 6 or times["ours"] < times["Triton's"] / 2


# The interpreter


@interpreted
def test_addresses_of_nothing():
    """An empty tensor's is 0, and every lane is masked."""
    empty, out = torch.empty(0), torch.ones(4)
    (launch,) = scale_plan(n=0, workspace="input").launches
    assert empty.data_ptr() == 0
    runtime.run_on(Plan((launch,)), {"input": empty, "out": out})
    assert out.tolist() == [1, 1, 1, 1]


@interpreted
def test_the_interpreter_leaves_triton_as_it_was(monkeypatch):
    from triton.runtime import interpreter as theirs

    from fastconv.triton_kernels import interpreter

    def state():
        owners = (tl, tl.core, tl.tensor, tl.math, theirs.interpreter_builder, theirs)
        found = [(name, value) for owner in owners for name, value in vars(owner).items()]
        return [pair for pair in found if not pair[0].startswith("grid_")]  # where it stopped

    data = torch.arange(4.0)
    before = state()
    for check in (True, False):
        monkeypatch.setattr(interpreter, "check_overflow", check)
        runtime.run_on(scale_interpreted(), {"input": data, "out": torch.empty(4)})
        with pytest.raises(Exception, match="division"):
            with interpreter.repaired():
                assert theirs.interpreter_builder.options.sanitize_overflow is check
                1 / 0  # noqa: B018
        assert state() == before


def scale_interpreted():
    (launch,) = scale_plan(n=4, step=1, workspace="out").launches
    return Plan((launch._replace(grid=(1,)),))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = fastconv.Conv2d(3, 4, 3, padding=1)
        self.norm = fastconv.BatchNorm2d(4)
        self.pool = fastconv.MaxPool2d(2)

    def forward(self, x):
        return self.pool(torch.relu(self.norm(self.conv(x))))


@interpreted
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_torch_compile(compiler):
    if compiler == "inductor":
        pytest.importorskip("torch._inductor")
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception:
            pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    nets = [Net(), Net()]
    nets[1].load_state_dict(nets[0].state_dict())
    torch._dynamo.reset()
    functions = [nets[0], torch.compile(nets[1], fullgraph=True, backend=compiler)]
    x = torch.randn(2, 3, 6, 6)
    results = []
    with fastconv.backend("triton"):
        for net, function in zip(nets, functions, strict=True):
            input = x.clone().requires_grad_()
            out = function(input)
            out.square().sum().backward()
            grads = [p.grad for p in net.parameters()]
            results.append([out, input.grad, *grads, *net.buffers()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours)


class Complaint(Exception):
    pass


@interpreted
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_errors_of_a_launch_arrive_as_themselves(monkeypatch, compiler):
    def complain(self, addresses):
        raise Complaint(threading.get_ident())

    def model(x, w):
        return ff.conv2d(x, w).sum()

    torch._dynamo.reset()
    function = model if compiler is None else torch.compile(model, backend=compiler)
    x, w = (torch.randn(1, 2, 3, 3, requires_grad=True) for _ in range(2))
    with fastconv.backend("triton"):
        out = function(x, w)
        with monkeypatch.context() as broken:
            broken.setattr(runtime.InterpretedRunner, "__call__", complain)
            with pytest.raises(Complaint):
                function(x, w)
            with pytest.raises(Complaint):
                out.backward()
        function(x, w).backward()  # and nothing is left behind
    assert x.grad is not None and w.grad is not None


def test_the_other_tests_of_this_file():
    """The interpreter is on, or it is not, for as long as a process lives."""
    if os.environ.get("FASTCONV_TESTING_TRITON"):
        pytest.skip("this is that process")
    environment = os.environ | {
        "TRITON_INTERPRET": "" if runtime.interpreted else "1",
        "FASTCONV_TESTING_TRITON": "1",
    }
    environment.pop("FASTCONV_REQUIRE_TRITON", None)  # not without the interpreter
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout and "passed" in done.stdout
