"""A fingerprint of csrc, kept by the build and compared by an import out of a source tree.

The build runs this file on its own, before torch or fastconv can be imported.
"""

import hashlib
from pathlib import Path


def source_digest(csrc):
    """SHA-256 over the paths and contents of the sources below `csrc`; None if there are none."""
    sources = sorted(p for p in Path(csrc).rglob("*") if p.suffix in _SUFFIXES)
    if not sources:
        return None
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.relative_to(csrc).as_posix().encode() + b"\0")
        digest.update(source.read_bytes() + b"\0")
    return digest.hexdigest()


_SUFFIXES = {".h", ".cuh", ".inl", ".cpp", ".cu"}
