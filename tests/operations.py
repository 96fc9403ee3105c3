"""Every differentiable operation in a few forms, called as ours or as torch's."""

import torch

import fastconv.functional as ff
from support import FORMATS

DOUBLE = {"dtype": torch.float64}


def leaf(*size, layout="NCHW", device="cpu"):
    t = torch.randn(size, **DOUBLE)
    if len(size) == 4:
        t = t.contiguous(memory_format=FORMATS[layout])
    return t.to(device).requires_grad_()


def after_norm(f, tensors, residual=None, training=False, activation="relu", recompute=False):
    """batch_norm_relu of 5 tensors or conv_bn_relu of 7; of torch's functions, their parts."""
    if residual is not None:
        residual = residual[: tensors[0].shape[0]]  # one sample alone has the first one's
    options = {"residual": residual, "training": training, "activation": activation}
    if f is ff and len(tensors) == 5:
        return ff.batch_norm_relu(*tensors, **options)
    if f is ff:
        return ff.conv_bn_relu(*tensors, **options, recompute=recompute)
    *conv, mean, var, weight, bias = tensors
    x = f.conv2d(*conv) if len(conv) > 1 else conv[0]
    z = f.batch_norm(x, mean, var, weight, bias, training)
    return getattr(f, activation)(z if residual is None else z + residual)


OPERATIONS = {
    "conv2d": (lambda f, x, w, b: f.conv2d(x, w, b, 2, 1), ((2, 4, 6, 6), (6, 4, 3, 3), (6,))),
    "conv2d grouped": (
        lambda f, x, w, b: f.conv2d(x, w, b, padding=1, groups=2),
        ((2, 4, 6, 6), (6, 2, 3, 3), (6,)),
    ),
    "max_pool2d": (lambda f, x: f.max_pool2d(x, 3, 2, 1), ((2, 4, 7, 6),)),
    "avg_pool2d": (lambda f, x: f.avg_pool2d(x, 3, 2, 1), ((2, 4, 7, 6),)),
    "adaptive_avg_pool2d": (lambda f, x: f.adaptive_avg_pool2d(x, (3, 2)), ((2, 4, 7, 6),)),
    "batch_norm": (
        lambda f, x, w, b: f.batch_norm(x, None, None, w, b, True),
        ((3, 4, 5, 6), (4,), (4,)),
    ),
    "batch_norm_relu": (
        lambda f, x, w, b: after_norm(f, (x, None, None, w, b), training=True),
        ((3, 4, 5, 6), (4,), (4,)),
    ),
    "batch_norm_relu residual": (
        lambda f, x, w, b, r: after_norm(
            f, (x, None, None, w, b), residual=r, training=True, activation="relu6"
        ),
        ((3, 4, 5, 6), (4,), (4,), (3, 4, 5, 6)),
    ),
    "conv_bn_relu": (
        lambda f, x, w, b, v, c: after_norm(
            f, (x, w, b, None, None, v, c), training=True, activation="silu"
        ),
        ((2, 4, 6, 6), (6, 4, 3, 3), (6,), (6,), (6,)),
    ),
    "conv_bn_relu recompute": (
        lambda f, x, w, v, c, r: after_norm(
            f, (x, w, None, None, None, v, c), residual=r, training=True, recompute=True
        ),
        ((2, 4, 6, 6), (6, 4, 3, 3), (6,), (6,), (2, 6, 4, 4)),
    ),
    "conv_bn_relu inference": (
        lambda f, x, w, v, c, r: after_norm(
            f, (x, w, None, v.detach() * 0, v.detach() * 0 + 2, v, c), residual=r
        ),
        ((2, 4, 6, 6), (6, 4, 3, 3), (6,), (6,), (2, 6, 4, 4)),
    ),
    "batch_norm inference": (
        lambda f, x, w, b: f.batch_norm(x, w.detach() * 0, w.detach() * 0 + 2, w, b),
        ((3, 4, 5, 6), (4,), (4,)),
    ),
}


def case(name, device="cpu", dtype=torch.float64):
    function, sizes = OPERATIONS[name]
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(s, generator=generator, **DOUBLE).to(device, dtype) for s in sizes]
    return function, tensors


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
