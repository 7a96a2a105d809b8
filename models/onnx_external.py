"""Which other files an ONNX file pulls in, and whether they may be.

A model may keep its weights in files beside it and name them by path, so a model from elsewhere could name
any file of this machine and have it read as weights. onnxruntime refuses paths and links that leave the
model's folder; a hard link it cannot see, and older releases see less. So the paths are checked here before
onnxruntime opens anything.

The names are read from the protobuf wire format itself, because serving does not need the `onnx` package.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path

# Where tensors can lie in a model: message -> field number -> message of that field (onnx.proto; numbers are
# never reused). `entry` is one key and value of a tensor's `external_data`, and ends the walk.
_NESTED: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


def check_files(model: Path) -> None:
    """Refuse a model that is no plain file, or whose external files are not plain files of its own folder.

    Raises:
        ValueError: One of them leaves the folder, is missing, is no regular file or has a second name (hard
            link); or the model is no protobuf message.
    """
    folder = model.parent.resolve()
    _check_regular(model, model.name)
    for location in sorted(_locations(model)):
        path = (folder / location).resolve()
        if not path.is_relative_to(folder):
            raise ValueError(f"external file {location!r} leaves the model's folder")
        status = _check_regular(path, f"external file {location!r}")
        if status.st_nlink > 1:
            raise ValueError(f"external file {location!r} is a hard link and may be any file: copy it instead")


def _check_regular(path: Path, what: str) -> os.stat_result:
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{what} is not a regular file")
    return status


def _locations(model: Path) -> set[str]:
    """Every `location` in any tensor of the model."""
    try:
        with (
            model.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            return set(_walk(view))
    except OSError as error:
        raise ValueError(f"{model.name}: {error.strerror}") from None
    except ValueError:  # also what mmap says of an empty file, and UTF-8 of bytes that are none
        raise ValueError(f"{model.name} is not an ONNX file") from None


def _walk(model: memoryview) -> Iterator[str]:
    # A stack of our own: nesting chosen by the file must not meet Python's recursion limit.
    open_messages = [("model", 0, len(model))]
    while open_messages:
        kind, start, end = open_messages.pop()
        entry: dict[int, str] = {}
        for number, begin, stop in _fields(model, start, end):
            if kind == "entry":
                entry[number] = str(model[begin:stop], "utf-8")
            elif number in _NESTED[kind]:
                open_messages.append((_NESTED[kind][number], begin, stop))
        if entry.get(1) == "location":
            yield entry.get(2, "")


def _fields(view: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, first and past-the-last byte of each length-delimited field between `at` and `end`."""
    while at < end:
        tag, at = _varint(view, at, end)
        match tag & 7:
            case 0:
                _, at = _varint(view, at, end)
            case 1:
                at += 8
            case 2:
                size, at = _varint(view, at, end)
                # Parsers keep 32 bits of a tag: higher ones would hide a field from this walk alone.
                yield (tag & 0xFFFFFFFF) >> 3, at, at + size
                at += size
            case 5:
                at += 4
            case _:
                raise ValueError
    if at > end:
        raise ValueError


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError
