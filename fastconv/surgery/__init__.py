"""Whole models: torch.nn's layers become fastconv's, and chains of layers become single kernels."""

from fastconv.surgery.conversion import convert, revert
from fastconv.surgery.fusion import fuse
from fastconv.surgery.reporting import Entry, Report, report

__all__ = ["Entry", "Report", "convert", "fuse", "report", "revert"]
