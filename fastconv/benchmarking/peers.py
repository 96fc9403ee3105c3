"""What fastconv is measured against: the same network out of torch.nn's layers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastconv
from fastconv.benchmarking.timing import Ratio, Timing, ratio, time_interleaved

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
WORKS = ("inference", "training step")


def torch_twin(model: nn.Module) -> nn.Module:
    """A copy of `model`, same weights and same state_dict keys, with torch.nn's layers inside.

    Works for any network built of fastconv's layers, since each is a subclass of the torch.nn layer
    that it replaces: the copy's layer becomes the plain one.

    Raises:
        TypeError: a layer of fastconv's has no torch.nn layer behind it.
    """
    twin = copy.deepcopy(model)
    for name, layer in twin.named_modules():
        if not _is_layer_of_ours(type(layer)):
            continue
        plain = next((base for base in type(layer).__mro__ if _is_torch_layer(base)), None)
        if plain is None:
            raise TypeError(f"{name} is a {type(layer).__name__}, which torch.nn does not have")
        layer.__class__ = plain
    return twin


def _is_layer_of_ours(cls: type) -> bool:
    return cls.__module__.startswith("fastconv.modules")


def _is_torch_layer(cls: type) -> bool:
    return cls.__module__.startswith("torch.nn.modules") and cls is not nn.Module


class Disagreement(AssertionError):
    """Two ways that should compute the same do not: a time would mean nothing."""


def assert_close(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    if got.shape != expected.shape:
        raise Disagreement(f"{what}: shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    error = (got.double() - expected.double()).abs().max().item()
    limit = tolerance * max(expected.double().abs().max().item(), 1e-30)
    # Written so that NaN fails.
    if not error <= limit:
        raise Disagreement(f"{what}: off by {error:.2g} where {limit:.2g} is allowed")


def inference_step(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """A call of `model`, put in eval mode now, without gradients."""
    model.eval()

    def step() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return step


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Forward, cross-entropy and backward of `model`, put in training mode now.

    The optimiser, the same for everyone, stays out.
    """
    model.train()

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        return loss.detach()

    return step


def _step(work: str, model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    if work == "inference":
        return inference_step(model, images)
    if work == "training step":
        return training_step(model, images, labels)
    raise ValueError(f"work must be one of {', '.join(WORKS)}, but got {work!r}")


def assert_same(
    work: str,
    ours: nn.Module,
    theirs: nn.Module,
    images: Tensor,
    labels: Tensor,
    tolerance: float = 1e-4,
) -> None:
    """Check that two models of equal weights give equal scores, or equal losses and gradients.

    Args:
        work: one of :data:`WORKS`.
        tolerance: errors are allowed up to this times the largest expected value of each tensor.

    Raises:
        Disagreement: with the first tensor that differs.
    """
    got, expected = (_step(work, model, images, labels)() for model in (ours, theirs))
    if work == "inference":
        assert_close("scores", got, expected, tolerance)
        return
    assert_close("loss", got, expected, tolerance)
    parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(f"gradient of {name}", parameter.grad, parameters[name].grad, tolerance)


@dataclass(frozen=True)
class Comparison:
    """One piece of work timed on both sides; each side has a timing for every layout."""

    work: str
    batch: int
    ours: dict[str, Timing]
    theirs: dict[str, Timing]

    @staticmethod
    def _best(timings: dict[str, Timing]) -> str:
        return min(timings, key=lambda layout: timings[layout].median)

    @property
    def our_layout(self) -> str:
        """The layout in which fastconv is faster."""
        return self._best(self.ours)

    @property
    def their_layout(self) -> str:
        """The layout in which torch.nn is faster."""
        return self._best(self.theirs)

    @property
    def speedup(self) -> Ratio:
        """torch.nn's time over fastconv's, each in its better layout: above 1, fastconv wins."""
        return ratio(self.theirs[self.their_layout], self.ours[self.our_layout])

    @property
    def winner(self) -> str:
        """Who is faster in nine rounds of ten, or "neither"."""
        won = self.speedup
        return "fastconv" if won.low > 1 else "torch.nn" if won.high < 1 else "neither"


def compare(
    work: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    rounds: int = 21,
    sample_seconds: float = 0.02,
    limit_seconds: float = 8.0,
    tolerance: float = 1e-4,
) -> Comparison:
    """Time `model` and its torch.nn twin at the same work, in both layouts.

    Results are compared before anything is timed. fastconv may not fall back to ATen meanwhile.

    Args:
        work: one of :data:`WORKS`.
        model: a network of fastconv's layers; it is copied, not changed.
        images, labels: one batch, on the device to measure.
        rounds, sample_seconds, limit_seconds: see
            :func:`fastconv.benchmarking.timing.time_interleaved`.
        tolerance: as of :func:`assert_same`.

    Raises:
        Disagreement: the two do not compute the same.
        RuntimeError: an operation has no kernel of fastconv's here.
    """
    ways = {}
    with fastconv.allow_fallback(False):
        for layout, memory_format in LAYOUTS.items():
            ours = copy.deepcopy(model).to(memory_format=memory_format)
            theirs = torch_twin(ours)
            x = images.contiguous(memory_format=memory_format)
            assert_same(work, ours, theirs, x, labels, tolerance)
            ways["ours", layout] = _step(work, ours, x, labels)
            ways["theirs", layout] = _step(work, theirs, x, labels)
        timings = time_interleaved(
            ways,
            rounds=rounds,
            sample_seconds=sample_seconds,
            device=images.device,
            limit_seconds=limit_seconds,
        )
    ours, theirs = (
        {layout: timings[side, layout] for layout in LAYOUTS} for side in ("ours", "theirs")
    )
    return Comparison(work, len(images), ours, theirs)
