"""What every kernel is compared with: float64, gathered window by window, without torch's kernels.

PyTorch's own CPU convolution ends the process on some valid problems (channels_last, S = 1 and
dilation), so it is no oracle for random geometry. These are: index arithmetic, einsum and sums,
differentiable by autograd, exact on small integers.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

Pair = tuple[int, int]


def pair(value) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def extent(size: int, window: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (window - 1) - 1) // stride + 1


def _taps(count: int, window: int, stride: int, dilation: int) -> torch.Tensor:
    """(count, window): where in the padded input tap w of output position p reads."""
    return torch.arange(count)[:, None] * stride + torch.arange(window)[None, :] * dilation


def windows(x, P, Q, kernel, stride, padding, dilation, fill=0.0):
    """N C P R Q S: each output position's window; positions outside the input read `fill`."""
    (R, S), (sh, sw), (ph, pw), (dh, dw) = map(pair, (kernel, stride, padding, dilation))
    rows, columns = _taps(P, R, sh, dh), _taps(Q, S, sw, dw)
    # ceil_mode reads past the right padding, and a stride may leave a part of it unread.
    bottom = int(rows.max()) + 1 - x.shape[2] - ph
    right = int(columns.max()) + 1 - x.shape[3] - pw
    padded = F.pad(x, (pw, max(right, 0), ph, max(bottom, 0)), value=fill)
    return padded[:, :, rows[:, :, None, None], columns[None, None]]


def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """The definition in the core's letters, in the dtype of x (float64 for a reference)."""
    N, C, H, W = x.shape
    K, _, R, S = weight.shape
    (sh, sw), (ph, pw), (dh, dw) = map(pair, (stride, padding, dilation))
    P, Q = extent(H, R, sh, ph, dh), extent(W, S, sw, pw, dw)
    taps = windows(x, P, Q, (R, S), stride, padding, dilation)
    taps = taps.reshape(N, groups, C // groups, P, R, Q, S)
    filters = weight.reshape(groups, K // groups, C // groups, R, S)
    out = torch.einsum("ngcprqs,gkcrs->ngkpq", taps, filters).reshape(N, K, P, Q)
    return out if bias is None else out + bias[:, None, None]


def conv2d_by_loops(x, weight, stride=1, padding=0, dilation=1, groups=1):
    """The same sum in seven Python loops: the reference's own reference."""
    N, _, H, W = x.shape
    K, per_group, R, S = weight.shape
    (sh, sw), (ph, pw), (dh, dw) = map(pair, (stride, padding, dilation))
    P, Q = extent(H, R, sh, ph, dh), extent(W, S, sw, pw, dw)
    out = torch.zeros(N, K, P, Q, dtype=x.dtype)
    for n in range(N):
        for k in range(K):
            first = k // (K // groups) * per_group
            for p in range(P):
                for q in range(Q):
                    for c in range(per_group):
                        for r in range(R):
                            for s in range(S):
                                h, w = p * sh - ph + r * dh, q * sw - pw + s * dw
                                if 0 <= h < H and 0 <= w < W:
                                    out[n, k, p, q] += x[n, first + c, h, w] * weight[k, c, r, s]
    return out


def conv2d_gradients(x, weight, grad, stride=1, padding=0, dilation=1, groups=1):
    """Gradients of input, weight and bias."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = torch.zeros(weight.shape[0], dtype=x.dtype, requires_grad=True)
    out = conv2d(x, weight, bias, stride, padding, dilation, groups)
    return torch.autograd.grad(out, (x, weight, bias), grad)


def conv2d_extended(x, weight, bias, grad, stride=1, padding=0, dilation=1, groups=1):
    """Output and the three gradients with 64 mantissa bits, for judging float64 itself: two
    float64 sums in the same order would agree to the last bit and hide their error."""
    N, C, H, W = x.shape
    K, _, R, S = weight.shape
    P, Q = grad.shape[2:]
    geometry = (P, Q, (R, S), stride, padding, dilation)
    wide = np.longdouble

    def array(t, *shape):
        return t.detach().numpy().astype(wide).reshape(shape)

    taps = array(windows(x, *geometry), N, groups, C // groups, P, R, Q, S)
    filters = array(weight, groups, K // groups, C // groups, R, S)
    dy = array(grad, N, groups, K // groups, P, Q)
    out = np.einsum("ngcprqs,gkcrs->ngkpq", taps, filters).reshape(N, K, P, Q)
    dtaps = np.einsum("ngkpq,gkcrs->ngcprqs", dy, filters).reshape(N, C, P * R * Q * S)
    where = windows(torch.arange(H * W).reshape(1, 1, H, W), *geometry, fill=-1).reshape(-1)
    inside = (where >= 0).numpy()
    dx = np.zeros((N, C, H * W), wide)
    np.add.at(dx, (slice(None), slice(None), where.numpy()[inside]), dtaps[:, :, inside])
    results = {
        "fprop": out + array(bias, K, 1, 1),
        "dgrad": dx.reshape(x.shape),
        "wgrad": np.einsum("ngkpq,ngcprqs->gkcrs", dy, taps).reshape(weight.shape),
        "bgrad": dy.sum((0, 3, 4)).reshape(K),
    }
    return {name: torch.from_numpy(a.astype(np.float64)) for name, a in results.items()}


def pool_extent(size, window, stride, padding, dilation, ceil_mode):
    room = size + 2 * padding - dilation * (window - 1) - 1
    out = (-(-room // stride) if ceil_mode else room // stride) + 1
    # With ceil_mode a window that would start in the right padding is dropped.
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def _pool_sizes(x, kernel, stride, padding, dilation, ceil_mode):
    geometry = map(pair, (kernel, stride, padding, dilation))
    return [
        pool_extent(size, *axis, ceil_mode)
        for size, axis in zip(x.shape[2:], zip(*geometry, strict=True), strict=True)
    ]


def max_pool2d(x, kernel, stride=None, padding=0, dilation=1, ceil_mode=False):
    """Values and torch's flat indices: of equal maxima the first, of NaNs the last. A window that
    dilation leads past the whole input is -inf, at -1 (torch: some place beyond the input)."""
    stride = kernel if stride is None else stride
    P, Q = _pool_sizes(x, kernel, stride, padding, dilation, ceil_mode)
    geometry = (P, Q, kernel, stride, padding, dilation)
    H, W = x.shape[2:]
    N, C = x.shape[:2]

    def flat(t):
        return t.permute(0, 1, 2, 4, 3, 5).flatten(4)

    taps = flat(windows(x, *geometry, fill=-torch.inf))
    where = torch.arange(H * W).reshape(1, 1, H, W)
    where = flat(windows(where, *geometry, fill=-1)).expand(N, C, P, Q, -1)
    order = torch.arange(taps.shape[-1])
    inside = where >= 0
    nan = taps.isnan()
    best = taps.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(-1, keepdim=True)
    first = torch.where(inside & (taps == best), order, order.numel()).amin(-1)
    last_nan = torch.where(nan, order, -1).amax(-1)
    chosen = torch.where(nan.any(-1), last_nan, first.clamp(max=order.numel() - 1))[..., None]
    return taps.gather(-1, chosen)[..., 0], where.gather(-1, chosen)[..., 0]


def max_pool2d_backward(grad, indices, H, W):
    N, C = grad.shape[:2]
    flat = torch.zeros(N, C, H * W, dtype=grad.dtype)
    seen = torch.where(indices >= 0, grad, 0)
    flat.scatter_add_(2, indices.clamp(min=0).flatten(2), seen.flatten(2))
    return flat.reshape(N, C, H, W)


def avg_pool2d_sums(
    x,
    kernel,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    """Each window's sum, and what it is divided by."""
    stride = kernel if stride is None else stride
    P, Q = _pool_sizes(x, kernel, stride, padding, 1, ceil_mode)
    total = windows(x, P, Q, kernel, stride, padding, 1).sum((3, 5))
    if divisor_override is not None:
        return total, torch.full((P, Q), float(divisor_override), dtype=x.dtype)

    def counts(size, out, window, step, pad):
        start = torch.arange(out) * step - pad
        end = (start + window).clamp(max=size + pad)
        if not count_include_pad:
            start, end = start.clamp(min=0), end.clamp(max=size)
        return (end - start).to(x.dtype)

    (R, S), (sh, sw), (ph, pw) = map(pair, (kernel, stride, padding))
    H, W = x.shape[2:]
    return total, counts(H, P, R, sh, ph)[:, None] * counts(W, Q, S, sw, pw)[None, :]


def adaptive_avg_pool2d_sums(x, output_size):
    """Cell i of O covers floor(i * size / O) up to ceil((i + 1) * size / O), as torch's does."""
    H, W = x.shape[2:]
    P, Q = output_size

    def cells(size, out):
        return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]

    rows = [
        torch.stack([x[:, :, h0:h1, w0:w1].sum((2, 3)) for w0, w1 in cells(W, Q)], -1)
        for h0, h1 in cells(H, P)
    ]
    heights, widths = (
        torch.tensor([b - a for a, b in cells(size, out)], dtype=x.dtype)
        for size, out in ((H, P), (W, Q))
    )
    return torch.stack(rows, -2), heights[:, None] * widths[None, :]


def avg_pool2d(x, *args, **options):
    total, divisor = avg_pool2d_sums(x, *args, **options)
    return total / divisor


def adaptive_avg_pool2d(x, output_size):
    total, divisor = adaptive_avg_pool2d_sums(x, output_size)
    return total / divisor


def average_extended(sums, x, grad=None):
    """Averages with 64 mantissa bits, or with `grad` the input's gradient. `sums` is one of the
    functions above with its options; its matrix of zeros and ones comes from the unit images."""
    N, C, H, W = x.shape
    unit = torch.eye(H * W, dtype=x.dtype).reshape(H * W, 1, H, W)
    matrix, divisor = sums(unit)
    P, Q = divisor.shape
    matrix, divisor, x = (
        t.detach().numpy().astype(np.longdouble) for t in (matrix.flatten(1), divisor, x)
    )
    if grad is None:
        out = (x.reshape(N * C, H * W) @ matrix).reshape(N, C, P, Q) / divisor
    else:
        share = grad.detach().numpy().astype(np.longdouble) / divisor
        out = (share.reshape(N * C, P * Q) @ matrix.T).reshape(N, C, H, W)
    return torch.from_numpy(out.astype(np.float64))


def batch_norm(x, weight=None, bias=None, mean=None, var=None, eps=1e-5):
    """Training statistics when mean is None. Differentiable, statistics included."""
    axes = [0, *range(2, x.dim())]
    shape = [1, -1] + [1] * (x.dim() - 2)
    if mean is None:
        mean = x.mean(axes)
        var = (x - mean.reshape(shape)).square().mean(axes)
    out = (x - mean.reshape(shape)) / (var.reshape(shape) + eps).sqrt()
    if weight is not None:
        out = out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


# Where the derivatives of the activations jump.
KINKS = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hardswish": (-3, 3)}


def activation_extended(z, name):
    """Value and derivative of an activation, in z's precision; torch's choices at the kinks."""
    if name == "none":
        return z, np.ones_like(z)
    if name in ("silu", "sigmoid"):
        s = 1 / (1 + np.exp(-z))
        return (z * s, s * (1 + z * (1 - s))) if name == "silu" else (s, s * (1 - s))
    if name == "hardswish":
        inner = np.where(z >= 3, 1, z / 3 + z.dtype.type(0.5))
        return z * np.clip(z + 3, 0, 6) / 6, np.where(z <= -3, 0, inner)
    if name == "leaky_relu":
        slope = z.dtype.type(0.01)
        return np.where(z < 0, z * slope, z), np.where(z > 0, 1, slope)
    top = 6 if name == "relu6" else np.inf
    return np.clip(z, 0, top), ((z > 0) & (z < top)).astype(z.dtype)


def batch_norm_extended(
    x, grad, weight, bias, mean=None, var=None, eps=1e-5, residual=None, activation="none"
):
    """activation(batch_norm(x) + residual) and the gradients of input, weight, bias and residual
    (where there is one) with 64 mantissa bits; training when mean is None."""
    wide, axes = np.longdouble, (0, *range(2, x.dim()))
    training, ones = mean is None, [1] * (x.dim() - 2)

    def column(t):
        return t.detach().numpy().astype(wide).reshape(1, -1, *ones)

    x, grad = (t.detach().numpy().astype(wide) for t in (x, grad))
    if training:
        mean = x.mean(axes, keepdims=True)
        var = np.square(x - mean).mean(axes, keepdims=True)
    else:
        mean, var = column(mean), column(var)
    scale = 1 / np.sqrt(var + wide(eps))
    normal = (x - mean) * scale
    z = normal * column(weight) + column(bias)
    if residual is not None:
        z = z + residual.detach().numpy().astype(wide)
    out, derivative = activation_extended(z, activation)
    grad = grad * derivative
    dweight = (grad * normal).sum(axes, keepdims=True)
    dbias = grad.sum(axes, keepdims=True)
    dx = grad * column(weight) * scale
    if training:
        count = x.size // x.shape[1]
        dx -= column(weight) * scale * (dbias + normal * dweight) / count
    results = (out, dx, dweight.reshape(-1), dbias.reshape(-1))
    results += () if residual is None else (grad,)
    return [torch.from_numpy(a.astype(np.float64)) for a in results]
