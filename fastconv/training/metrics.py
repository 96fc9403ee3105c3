"""Accuracy and macro F1 of predicted classes, in a few lines of torch."""

import torch
from torch import Tensor


def _check(predictions: Tensor, labels: Tensor) -> None:
    if predictions.dim() != 1 or predictions.shape != labels.shape:
        raise ValueError(
            "predictions and labels must be one class a sample, but have shapes "
            f"{tuple(predictions.shape)} and {tuple(labels.shape)}"
        )
    if labels.numel() == 0:
        raise ValueError("there is nothing to score: predictions and labels are empty")
    if predictions.is_floating_point() or labels.is_floating_point():
        raise ValueError(
            f"classes are whole numbers, but got {predictions.dtype} and {labels.dtype}"
        )


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The share of predictions that are right.

    Args:
        predictions: (N,) predicted classes.
        labels: (N,) true classes.

    Raises:
        ValueError: shapes differ, there is no sample, or the values are not classes.
    """
    _check(predictions, labels)
    return (predictions == labels).double().mean().item()


def macro_f1(predictions: Tensor, labels: Tensor) -> float:
    """The mean over classes of F1 = 2 TP / (2 TP + FP + FN), each class weighing the same.

    Classes that occur neither among the labels nor among the predictions do not count, as in
    scikit-learn's ``f1_score(average="macro")``; a class never hit has F1 = 0.

    Args and errors: as :func:`accuracy`.
    """
    _check(predictions, labels)
    if min(predictions.min().item(), labels.min().item()) < 0:
        raise ValueError("classes are numbered from 0, but one is negative")
    classes = max(predictions.max().item(), labels.max().item()) + 1
    hits = torch.bincount(labels[predictions == labels], minlength=classes).double()
    # 2 TP + FP + FN: how often the class was predicted plus how often it was true.
    total = torch.bincount(predictions, minlength=classes) + torch.bincount(
        labels, minlength=classes
    )
    occurs = total > 0
    return (2 * hits[occurs] / total[occurs]).mean().item()
