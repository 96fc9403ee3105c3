"""Accuracy, macro F1 and the confusion matrix of predicted classes, in a few lines of torch."""

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


def confusion_matrix(predictions: Tensor, labels: Tensor, classes: int | None = None) -> Tensor:
    """How often each true class (row) was taken for each class (column).

    Args:
        predictions, labels: as of :func:`accuracy`.
        classes: how many there are; by default one more than the highest that occurs.

    Returns:
        (classes, classes) in int64, on the CPU. Matrices of parts of the data may be added.

    Raises:
        ValueError: as :func:`accuracy`, and for a class that is negative or not below `classes`.
    """
    _check(predictions, labels)
    if min(predictions.min().item(), labels.min().item()) < 0:
        raise ValueError("classes are numbered from 0, but one is negative")
    highest = max(predictions.max().item(), labels.max().item())
    classes = highest + 1 if classes is None else classes
    if highest >= classes:
        raise ValueError(f"there are {classes} classes, numbered from 0, but one is {highest}")
    places = (labels * classes + predictions).cpu()
    return torch.bincount(places, minlength=classes**2).reshape(classes, classes)


def macro_f1_of(confusion: Tensor) -> float:
    """:func:`macro_f1` from a :func:`confusion_matrix`."""
    # 2 TP + FP + FN: how often the class was predicted plus how often it was true.
    total = confusion.sum(0) + confusion.sum(1)
    occurs = total > 0
    return (2 * confusion.diagonal()[occurs].double() / total[occurs]).mean().item()


def macro_f1(predictions: Tensor, labels: Tensor) -> float:
    """The mean over classes of F1 = 2 TP / (2 TP + FP + FN), each class weighing the same.

    Classes that occur neither among the labels nor among the predictions do not count, as in
    scikit-learn's ``f1_score(average="macro")``; a class never hit has F1 = 0.

    Args and errors: as :func:`accuracy`.
    """
    return macro_f1_of(confusion_matrix(predictions, labels))
