"""BatchNorm2d."""

import torch
from torch import nn

from fastconv import functional


def advance(norm):
    """Counts a training batch; returns the weight that its statistics get in the running ones.

    With ``momentum=None`` that is 1 / batches seen: a plain average.
    """
    counting = norm.training and norm.track_running_stats and norm.num_batches_tracked is not None
    if counting:
        norm.num_batches_tracked.add_(1)
    if norm.momentum is not None:
        return norm.momentum
    return 1.0 / float(norm.num_batches_tracked) if counting else 0.0


def uses_batch_statistics(norm):
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def running_statistics(norm):
    """The buffers to read or update; none in a training pass that does not track them."""
    if norm.training and not norm.track_running_stats:
        return None, None
    return norm.running_mean, norm.running_var


class BatchNorm2d(nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on fastconv's kernels."""

    def forward(self, input):
        if isinstance(input, torch.Tensor):  # torch.fx traces with proxies, which have no rank
            self._check_input_dim(input)
        momentum = advance(self)
        return functional.batch_norm(
            input,
            *running_statistics(self),
            self.weight,
            self.bias,
            uses_batch_statistics(self),
            momentum,
            self.eps,
        )
