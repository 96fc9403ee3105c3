"""Writing a result so that neither a crash nor a full disk costs the file that was there."""

import io
import os
from pathlib import Path

import torch
from torch import nn


def check_writable(path: str | os.PathLike) -> None:
    """Find out before hours of work, not after, that `path` cannot be written.

    Raises:
        OSError: with one sentence that names the path.
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: no permission in {target.parent}")


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path`: afterwards the file is either the old one or the whole new one.

    The bytes go to a temporary file in the same folder, reach the disk, and take the name in one
    step. A link is followed, so that the file it names is replaced and not the link.

    Raises:
        OSError: the write failed; what was at `path` before is untouched.
    """
    check_writable(path)
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the model's state_dict, for ``model.load_state_dict(torch.load(path))``.

    Serialised in memory first: a failing disk then shows as the operating system's own error.
    """
    buffer = io.BytesIO()
    torch.save({name: value.cpu() for name, value in model.state_dict().items()}, buffer)
    write_atomically(path, buffer.getvalue())
