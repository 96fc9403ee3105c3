"""What runs whole networks on a CPU beside fastconv.fuse: PyTorch eager and compiled, ONNX Runtime,
OpenVINO; each set up as its own documentation says is fastest in float32.

Each function makes a call of no arguments out of a model of torch.nn's layers and a batch.
"""

import contextlib
import copy
import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastconv.benchmarking.peers import LAYOUTS, inference_step


class LeftOut(Exception):
    """A runtime that is not installed, or does not take the network; the message says why."""


def eager(model: nn.Module, images: Tensor, layout: str) -> Callable[[], Tensor]:
    model, images = _in_layout(model, images, layout)
    return inference_step(model, images)


def compiled(model: nn.Module, images: Tensor, layout: str) -> Callable[[], Tensor]:
    """torch.compile with freezing: weights become constants, packed once, BatchNorm folded in."""
    import torch._inductor.config as inductor

    model, images = _in_layout(model.eval(), images, layout)
    made = torch.compile(model)
    with inductor.patch(freezing=True), torch.no_grad():
        try:
            made(images)
        except Exception as error:  # no C++ compiler, mostly
            raise LeftOut(f"torch.compile: {type(error).__name__}: {_first_line(error)}") from error

    def step() -> Tensor:
        with torch.no_grad():  # as it was compiled: under inference_mode it would be once more
            return made(images)

    return step


def onnx_runtime(model: nn.Module, images: Tensor, threads: int) -> Callable[[], Tensor]:
    onnxruntime = _import("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # By default its threads go on spinning after a call, on the cores of whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        _as_onnx(model, images), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(model: nn.Module, images: Tensor, threads: int) -> Callable[[], Tensor]:
    ov = _import("openvino")
    with _silence():
        found = ov.convert_model(model.eval(), example_input=images, input=[tuple(images.shape)])
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = ov.Core().compile_model(found, "CPU", settings).create_infer_request()
    feed = images.numpy()

    def step() -> Tensor:
        return torch.from_numpy(request.infer([feed], share_inputs=True)[0])

    return step


def ways_of(
    model: nn.Module, images: Tensor, threads: int
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Every runtime that is here: (name -> call, name -> why it was left out)."""
    makers = {
        **{f"eager {layout}": (eager, layout) for layout in LAYOUTS},
        **{f"compile {layout}": (compiled, layout) for layout in LAYOUTS},
        "ONNX Runtime": (onnx_runtime, threads),
        "OpenVINO": (openvino, threads),
    }
    ways, left_out = {}, {}
    for name, (make, argument) in makers.items():
        try:
            ways[name] = make(model, images, argument)
        except LeftOut as reason:
            left_out[name] = str(reason)
    return ways, left_out


def versions() -> dict[str, str]:
    """Of those that are installed."""
    found = {"torch": torch.__version__}
    for name in ("onnxruntime", "openvino"):
        with contextlib.suppress(LeftOut):
            found[name] = _import(name).__version__
    return found


def _in_layout(model, images, layout):
    memory_format = LAYOUTS[layout]
    return (
        copy.deepcopy(model).to(memory_format=memory_format),
        images.contiguous(memory_format=memory_format),
    )


def _import(name):
    try:
        return __import__(name)
    except ImportError as error:
        raise LeftOut(f"{name} is not installed ({error})") from error


def _as_onnx(model, images):
    _import("onnx")
    _import("onnxscript")
    file = io.BytesIO()
    with _silence():
        torch.onnx.export(model.eval(), (images,), dynamo=True, verbose=False).save(file)
    return file.getvalue()


@contextlib.contextmanager
def _silence():
    """Exporters print their progress."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _first_line(error):
    return str(error).strip().split("\n")[0][:120]
