"""Files of weights and of unfinished trainings: written whole, read with suspicion."""

import io
import os
import pickle
import warnings
import zipfile
from typing import Any

import torch
from torch import Tensor, nn

from fastconv.training.files import write_atomically

KIND = "fastconv training"
VERSION = 1
_KEYS = {
    "kind", "version", "arguments", "images", "classes", "model", "optimizer", "scaler",
    "processes", "best", "history",
}  # fmt: skip


class CheckpointError(RuntimeError):
    """A file cannot be used; the message is one sentence that names it."""


def save_training(state: dict[str, Any], path: str | os.PathLike) -> None:
    """Write the state of a training, for :func:`load_training`.

    Raises:
        OSError: the write failed; what was at `path` before is untouched.
    """
    buffer = io.BytesIO()
    torch.save({"kind": KIND, "version": VERSION, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_training(path: str | os.PathLike) -> dict[str, Any]:
    """The state that :func:`save_training` wrote.

    Raises:
        CheckpointError: the file is absent, damaged or something else.
    """
    state = _load(path)
    if not isinstance(state, dict) or state.get("kind") != KIND:
        hint = "; --weights starts from weights" if _is_state_dict(state) else ""
        raise CheckpointError(f"{path} is no checkpoint of fastconv train{hint}")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of version {state.get('version')}, this is version {VERSION}"
        )
    missing = sorted(_KEYS - set(state))
    if missing:
        raise CheckpointError(f"{path} is damaged: it has no {missing[0]!r}")
    return state


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Give `model` the weights in a file: a state_dict, or a checkpoint of `fastconv train`.

    Raises:
        CheckpointError: the file is absent, damaged or something else, or its weights belong to
            another network; `model` is as before.
    """
    state = _load(path)
    if isinstance(state, dict) and state.get("kind") == KIND:
        state = state.get("model")
    if not _is_state_dict(state):
        raise CheckpointError(f"{path} is no state_dict: it does not hold tensors by name")
    fit_weights(model, state, path)


def fit_weights(model: nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """``model.load_state_dict(state)``, all or nothing, with an error of one sentence.

    Raises:
        CheckpointError: names are missing or unknown, or a shape differs.
    """
    own = model.state_dict()
    problems = [
        f"{path} {verb} {_names(names)}"
        for verb, names in (
            ("lacks", [name for name in own if name not in state]),
            ("has the unknown", [name for name in state if name not in own]),
        )
        if names
    ]
    problems += [
        f"{name} is {tuple(state[name].shape)} in {path} and {tuple(value.shape)} in the network"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ][:1]
    if problems:
        raise CheckpointError(f"the weights do not fit the network: {', and '.join(problems)}")
    model.load_state_dict(state)


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def _is_state_dict(state: Any) -> bool:
    return (
        isinstance(state, dict)
        and len(state) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    )


def _load(path: str | os.PathLike) -> Any:
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no file {path}")
    try:
        # torch.load does not compare checksums, and warns of what becomes an error below.
        broken = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
        if broken is not None:
            raise CheckpointError(f"{path} is damaged: the checksum of {broken} is wrong")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors, numbers and names"
        ) from error
    # Whatever damaged bytes make torch's reader raise: KeyError, EOFError, UnicodeDecodeError ...
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: reading it ends in {error!r:.80}") from error


def random_state(device: torch.device) -> dict[str, Tensor]:
    """torch's generators as they are, on the CPU and on `device`."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put torch's generators where :func:`random_state` found them."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
