"""Whole models: torch.nn's layers become fastconv's, and chains of layers become single kernels."""

from fastconv.surgery.conversion import convert, revert
from fastconv.surgery.filters import forget_filters, kept_filters
from fastconv.surgery.fusion import fuse
from fastconv.surgery.reporting import Entry, Report, report

__all__ = [
    "Entry",
    "Report",
    "convert",
    "forget_filters",
    "fuse",
    "kept_filters",
    "report",
    "revert",
]
