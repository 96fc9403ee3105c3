"""Runs every GPU row once or twice, each forced, and compares with PyTorch on the CPU in float64.

A smoke test for a GPU, and with --small a program short enough for compute-sanitizer. --emulated
runs the same rows on the CPU. Ends with status 1 when a row is wrong or nothing ran.
"""

import argparse
import contextlib
import sys

import torch
import torch.nn.functional as F

import fastconv
import fastconv.functional as ff

LAYOUTS = (torch.contiguous_format, torch.channels_last)
# What tensors hold, what torch's switch says of float32, and the rounding that then counts.
MODES = (
    (torch.float32, "ieee", 2**-23),
    (torch.float32, "tf32", 2**-10),
    (torch.float64, "ieee", 2**-52),
    (torch.float16, "ieee", 2**-10),
    (torch.bfloat16, "ieee", 2**-7),
)

# (input, weight, options).
SMALL_CONVOLUTIONS = [
    ((2, 8, 9, 10), (16, 8, 3, 3), {"padding": 1}),
    ((1, 3, 12, 12), (8, 3, 7, 7), {"stride": 2, "padding": 3}),
    ((2, 16, 7, 7), (24, 16, 1, 1), {}),
    ((2, 8, 9, 9), (8, 1, 3, 3), {"padding": 1, "groups": 8}),
    ((2, 12, 9, 9), (8, 6, 3, 3), {"dilation": 2, "groups": 2}),
    # What the tensor cores take: channels in whole 16-byte units, and in whole stages of 64.
    ((2, 64, 9, 10), (72, 64, 3, 3), {"padding": 1}),
    ((3, 64, 9, 9), (128, 64, 3, 3), {"stride": 2, "padding": 1}),
    ((2, 40, 8, 7), (136, 40, 1, 1), {}),
    ((2, 64, 9, 9), (64, 64, 1, 1), {"stride": 2}),
]
CONVOLUTIONS = [
    *SMALL_CONVOLUTIONS,
    ((8, 64, 28, 28), (96, 64, 3, 3), {"padding": 1}),
    ((4, 128, 14, 14), (256, 128, 1, 1), {}),
    ((4, 64, 28, 28), (64, 1, 5, 5), {"padding": 2, "groups": 64}),
]
# Whole tiles on many SMs, which an emulator takes minutes for.
LARGE_CONVOLUTIONS = [
    ((16, 256, 14, 14), (256, 256, 3, 3), {"padding": 1}),
    ((8, 128, 56, 56), (128, 128, 3, 3), {"stride": 2, "padding": 1}),
    ((8, 64, 56, 56), (256, 64, 1, 1), {}),
    ((8, 256, 28, 28), (512, 256, 1, 1), {"stride": 2}),
    ((8, 128, 28, 28), (96, 128, 3, 3), {"padding": 2, "dilation": 2}),
    ((8, 256, 28, 28), (256, 64, 3, 3), {"padding": 1, "groups": 4}),
    ((8, 3, 64, 64), (64, 3, 7, 7), {"stride": 2, "padding": 3}),
]
IMAGES = [(2, 8, 9, 10), (3, 5, 7, 7), (8, 64, 56, 56), (4, 2048, 7, 7)]


def convolution(module, x, w, b, options):
    return module.conv2d(x, w, b, **options)


def fused(module, x, w, b, options):
    if module is ff:
        return ff.conv2d_max_pool2d(x, w, b, **options)
    return F.max_pool2d(F.relu(F.conv2d(x, w, b, **options)), 2)


def normalised(module, x, w, b, options):
    if module is ff:
        pairs = [[options.get(name, least)] * 2 for name, least in WINDOW]
        groups = options.get("groups", 1)
        rest = (None, None, None, 1e-5, *pairs, groups, "none", False)
        return torch.ops.fastconv.conv_bn_training(x, w, b, *rest)[0]
    return F.batch_norm(F.conv2d(x, w, b, **options), None, None, training=True)


WINDOW = (("stride", 1), ("padding", 0), ("dilation", 1))


def max_pool(module, x):
    return module.max_pool2d(x, 3, 2, 1)


def average(module, x):
    return module.avg_pool2d(x, 3, 2, 1, count_include_pad=False)


def adaptive(module, x):
    return module.adaptive_avg_pool2d(x, 1)


def norm(module, x):
    return module.batch_norm(x, None, None, training=True)


def norm_relu(module, x):
    if module is ff:
        return ff.batch_norm_relu(x, None, None, training=True, residual=x)
    return F.relu(F.batch_norm(x, None, None, training=True) + x)


def norm_silu(module, x):
    if module is ff:
        return ff.batch_norm_relu(x, None, None, training=True, activation="silu")
    return F.silu(F.batch_norm(x, None, None, training=True))


CALLS = {
    "conv2d": convolution,
    "conv2d_max_pool2d": fused,
    "conv2d_statistics": normalised,
    "max_pool2d": max_pool,
    "avg_pool2d": average,
    "adaptive_avg_pool2d": adaptive,
    "batch_norm": norm,
}


def problems(row, convolutions):
    """(name, function of a module and leaves, leaves, options), on the CPU in float64."""
    call = CALLS[row.op]
    if row.op.startswith("conv2d"):
        for size, weight, options in convolutions:
            leaves = torch.randn(size), torch.randn(weight) / 4, torch.randn(weight[0])
            yield f"{size} * {weight}", call, leaves, (options,)
    else:
        calls = (norm, norm_relu, norm_silu) if row.op == "batch_norm" else (call,)
        for size in IMAGES[: 2 if convolutions is SMALL_CONVOLUTIONS else None]:
            for call in calls:
                yield f"{call.__name__} {size}", call, (torch.randn(size),), ()


def results(row, call, module, leaves, arguments):
    """What `row` computes: the output, or the gradient of its direction."""
    if row.direction == "fprop":
        with torch.inference_mode():
            return call(module, *leaves, *arguments)
    which = {"dgrad": 0, "wgrad": 1, "bgrad": 2}[row.direction]
    leaves = [t.detach().requires_grad_(i == which) for i, t in enumerate(leaves)]
    out = call(module, *leaves, *arguments)
    weights = torch.arange(out.numel(), dtype=torch.float64).remainder(7).sub(3)
    grad = weights.view(out.shape).to(out.device, out.dtype)
    return torch.autograd.grad(out, leaves[which], grad)[0]


def emulated_precision(precision: str):
    """torch's switches do not reach CPU tensors."""
    return fastconv.emulator.tf32() if precision == "tf32" else contextlib.nullcontext()


def check(row, device: str, convolutions) -> tuple[int, list[str]]:
    ran, wrong = 0, []
    for dtype, precision, eps in MODES:
        if dtype not in row.dtypes or (precision == "tf32" and not row.op.startswith("conv2d")):
            continue
        torch.backends.cudnn.conv.fp32_precision = precision
        for layout in LAYOUTS:
            for name, call, leaves, arguments in problems(row, convolutions):
                leaves = [t.to(dtype) for t in leaves]
                expected = results(row, call, F, [t.double() for t in leaves], arguments)
                leaves = [
                    t.to(device, memory_format=layout) if t.dim() == 4 else t.to(device)
                    for t in leaves
                ]
                try:
                    with fastconv.kernel(row.name), emulated_precision(precision):
                        got = results(row, call, ff, leaves, arguments).double().cpu()
                except RuntimeError as error:
                    if f"kernel {row.name} is forced and cannot run" in str(error):
                        continue
                    raise
                ran += 1
                # A sum of n products errs by less than n times a rounding of the largest; what
                # is wrong is wrong by far more. The tests hold the exact contract.
                allowed = 64 * eps * expected.abs().max().item()
                error = (got - expected).abs().max().item()
                if not error <= allowed:
                    what = f"{row.name} {dtype} {precision} {layout} {name}"
                    wrong.append(f"{what}: {error} > {allowed}")
    return ran, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--small", action="store_true", help="the first few problems alone")
    parser.add_argument("--emulated", action="store_true", help="on the CPU, by the emulator")
    arguments = parser.parse_args()
    backends, device = (
        (("emulator",), "cpu") if arguments.emulated else (("cuda", "triton"), "cuda")
    )
    if arguments.emulated:
        fastconv.emulator.load()
    convolutions = CONVOLUTIONS + LARGE_CONVOLUTIONS
    if arguments.emulated:
        convolutions = CONVOLUTIONS
    if arguments.small:
        convolutions = SMALL_CONVOLUTIONS
    torch.manual_seed(0)
    total, faults = 0, []
    for row in fastconv.kernels():
        if row.backend not in backends or row.op not in CALLS:
            continue
        ran, wrong = check(row, device, convolutions)
        print(f"{row.name:<48} {ran:>4} runs, {len(wrong)} wrong")
        total += ran
        faults += wrong
    print("\n".join(faults + [f"{total} runs, {len(faults)} wrong"]))
    return 0 if total and not faults else 1


if __name__ == "__main__":
    sys.exit(main())
