"""Filters that fused models keep as the CPU's kernels pack them."""

from fastconv import _extension


def kept_filters():
    """How many filters are kept packed, and their bytes: (count, bytes).

    On a CPU, a fused model's convolutions pack their filters at the first call and keep them for as
    long as the parameter's memory lives: as much memory again as the filters (more for Winograd's).
    They are packed anew when the parameter changes: its version, its memory, or one of 32 elements
    spread over it. So a change of a few elements through ``.data`` or NumPy, which PyTorch does not
    count, may go unseen: call :func:`forget_filters` after such a one.
    """
    return _extension.load().kept_filters()


def forget_filters():
    """Drops all filters that are kept packed; the next calls pack them again."""
    _extension.load().forget_filters()
