"""The Triton rows by name, and what runs one on a problem. ``csrc/triton/table.cpp`` holds the same
rows' other half: what each takes and what it is expected to cost."""

from triton.runtime.errors import OutOfResources

from fastconv import _extension
from fastconv.triton_kernels import (
    avg_pool2d,
    batch_norm_dgrad,
    batch_norm_fprop,
    conv1x1,
    conv2d_bgrad,
    conv2d_depthwise,
    conv2d_dgrad,
    conv2d_fprop,
    conv2d_wgrad,
    max_pool2d,
    runtime,
)
from fastconv.triton_kernels.autotune import stored_choice
from fastconv.triton_kernels.plan import Row
from fastconv.triton_kernels.problem import BatchNormProblem, Conv2dProblem, Pool2dProblem

_MODULES = (
    conv2d_fprop,
    conv2d_dgrad,
    conv2d_wgrad,
    conv2d_depthwise,
    conv1x1,
    conv2d_bgrad,
    max_pool2d,
    avg_pool2d,
    batch_norm_fprop,
    batch_norm_dgrad,
)

ROWS: dict[str, Row] = {row.name: row for module in _MODULES for row in module.ROWS}


def problem_of(row: str, fields: tuple):
    """The fields that csrc/torch/triton.cpp hands over, with their names."""
    return _kind_of(row)[1](*fields)


def runner_for(row: str, fields: tuple, device: int):
    """A function of the call's addresses, in the order of csrc/core's Args, that runs the row in
    the configuration that was once measured to be the fastest, or else in choose's. Where that
    asks a card for more shared memory or registers than it has, the next of the table serves."""
    problem, entry = problem_of(row, fields), ROWS[row]
    first = stored_choice(entry, problem, device)
    for config in (first, *entry.configs_for(problem, runtime.device_of(device))):
        try:
            return configured_runner(row, problem, device, config)
        except OutOfResources as error:
            refused = error
    raise refused


def configured_runner(row: str, problem, device: int, config):
    """The same in a configuration of the row's table; None: in choose's."""
    plan = ROWS[row].plan(problem, runtime.device_of(device), config)
    names = tuple(_extension.load().triton_fields()[_kind_of(row)[0]][1])
    return runtime.runner_of(plan, names, device, problem.aligned)


def _kind_of(row):
    if row.startswith("batch_norm"):
        return "batch_norm", BatchNormProblem
    if row.startswith("conv"):
        return "conv2d", Conv2dProblem
    return "pool2d", Pool2dProblem
