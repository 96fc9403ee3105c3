"""torch's own checks of every operator that is registered, and what it says on meta tensors."""

import pytest
import torch

import fastconv.functional as ff
from operations import OPERATIONS, case
from support import FORMATS


def opcheck_samples(device):
    """A few calls of every schema, by name. The test fails when a schema has none."""

    def r(*size, dtype=torch.float32, grad=True, layout="NCHW"):
        t = torch.randn(size, dtype=dtype, device=device)
        if len(size) == 4:
            t = t.contiguous(memory_format=FORMATS[layout])
        return t.requires_grad_(grad)

    def positive(*size):
        return torch.rand(size, device=device) + 0.5

    x, w, b = (2, 4, 6, 5), (6, 2, 3, 3), (6,)
    tail = ([2, 1], [1, 1], [1, 1], 2)
    out = (2, 6, 3, 5)
    window = ([3, 2], [2, 2], [1, 0])
    pooled = (2, 4, 3, 2)
    samples = {name: [] for name in (
        "conv2d", "conv2d_dgrad", "conv2d_wgrad", "conv2d_bgrad", "conv_bn_act", "conv_bn_training",
        "max_pool2d", "max_pool2d_with_offsets", "max_pool2d_with_indices",
        "max_pool2d_backward", "avg_pool2d", "avg_pool2d_backward", "adaptive_avg_pool2d",
        "adaptive_avg_pool2d_backward", "batch_norm_training", "batch_norm_inference",
        "batch_norm_backward",
    )}  # fmt: skip
    for layout, last in (("NCHW", False), ("NHWC", True)):

        def t(*size, layout=layout, grad=True):
            return r(*size, layout=layout, grad=grad)

        samples["conv2d"] += [(t(*x), t(*w), r(*b), *tail), (t(*x), t(*w), None, *tail)]
        samples["conv2d_dgrad"] += [(t(*out), t(*w), list(x), *tail, last)]
        samples["conv2d_wgrad"] += [(t(*out), t(*x), list(w), *tail, last)]
        samples["conv2d_bgrad"] += [(t(*out),)]
        norm, fixed = (r(6, grad=False), positive(6)), (t(*x, grad=False), t(*w, grad=False))
        none = (None, None, None, None)
        samples["conv_bn_act"] += [
            (*fixed, None, *norm, None, None, None, 1e-5, *tail, "relu"),
            (*fixed, *norm[:1], *norm, *norm, t(*out, grad=False), 1e-5, *tail, "silu"),
            (*fixed, norm[0], *none, None, 0.0, *tail, "relu", [2, 2], [], [0, 0]),
            (*fixed, None, *norm, None, None, None, 1e-5, *tail, "silu", *window),
            (t(*x), t(*w), r(*b), *none, t(*out), 0.0, *tail, "relu", *window),
        ]  # fmt: skip
        samples["conv_bn_training"] += [
            (t(*x), t(*w), r(*b), r(6), r(6), None, 1e-5, *tail, "none", False),
            (t(*x), t(*w), None, None, None, None, 1e-3, *tail, "silu", False),
            (t(*x), t(*w), None, r(6), r(6), t(*out), 1e-5, *tail, "relu", False),
            (t(*x), t(*w), r(*b), r(6), r(6), t(*out), 1e-5, *tail, "hardswish", True),
        ]
        for name in ("max_pool2d", "max_pool2d_with_offsets", "max_pool2d_with_indices"):
            samples[name] += [
                (t(*x), *window, [1, 1], True),
                (t(*x), [2, 2], [], [0, 0], [2, 1], False),
            ]
        big = torch.ops.fastconv.max_pool2d_with_offsets(t(*x, grad=False), *window, [1, 1], False)[
            1
        ]
        samples["max_pool2d_backward"] += [(t(*pooled), big, list(x), *window, [1, 1], False, last)]
        samples["avg_pool2d"] += [
            (t(*x), *window, True, False, None),
            (t(*x), [2, 2], [], [0, 0], False, True, 3),
        ]
        samples["avg_pool2d_backward"] += [(t(*pooled), list(x), *window, False, True, None, last)]
        samples["adaptive_avg_pool2d"] += [(t(*x), [3, 2]), (t(*x), [1, 1])]
        samples["adaptive_avg_pool2d_backward"] += [(t(*pooled), list(x), last)]
        samples["batch_norm_training"] += [
            (t(*x), r(4), r(4), None, 1e-5, "none"),
            (t(*x), None, None, t(*x), 1e-3, "leaky_relu"),
            (t(*x), r(4), r(4), t(*x), 1e-5, "sigmoid"),
        ]
        norm = (r(4, grad=False), positive(4))
        samples["batch_norm_inference"] += [
            (t(*x), r(4), r(4), *norm, None, 1e-5, "relu6"),
            (t(*x), r(4), r(4), *norm, t(*x), 1e-5, "none"),
        ]
        masks = ([True] * 4, [True, False, False, False], [False, True, True, True])
        backwards = [
            (t(*x), t(*x), r(4), r(4), *norm, *after, training, 1e-5, activation, mask)
            for training in (True, False)
            for mask in masks
            for *after, activation in (
                (None, None, "none"),
                (t(*x), None, "silu"),
                (None, t(*x, grad=False), "relu"),
            )
        ]
        samples["batch_norm_backward"] += backwards[last::2]  # each in one of the layouts
    return samples


def registered():
    names = torch._C._dispatch_get_all_op_names()
    return sorted({n.split("::")[1].split(".")[0] for n in names if n.startswith("fastconv::")})


@pytest.mark.parametrize("name", registered())
def test_opcheck(name):
    samples = opcheck_samples("cpu").get(name)
    assert samples, f"no opcheck sample for torch.ops.fastconv.{name}: add one"
    operator = getattr(torch.ops.fastconv, name).default
    for sample in samples:
        torch.library.opcheck(operator, sample)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("layout", FORMATS)
def test_meta_gives_shapes_and_strides(name, layout):
    function, tensors = case(name, dtype=torch.float32)
    tensors = [t.contiguous(memory_format=FORMATS[layout]) if t.dim() == 4 else t for t in tensors]
    real = function(ff, *tensors)
    meta = function(ff, *[t.to("meta") for t in tensors])
    assert meta.device.type == "meta"
    assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)
