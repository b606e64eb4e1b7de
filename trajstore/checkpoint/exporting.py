"""A checkpoint as one file of another format: torch's ``.pt``, or ``.safetensors``."""

from __future__ import annotations

import io
import json
import os
import struct
from pathlib import Path
from typing import Any

from trajstore.checkpoint import tensors
from trajstore.checkpoint.folder import OwnFolder, find, open_folder
from trajstore.checkpoint.reading import Reader
from trajstore.errors import AlreadyExistsError, SchemaError, UnsupportedFormatError
from trajstore.media.publish import ensure_folder, publish_file
from trajstore.media.storage import LocalStorage

_SAFE = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64",
}  # fmt: skip


def export_checkpoint(path: str | Path, which: str | int, target: str | Path, section: str = "") -> str:
    """Write a checkpoint, or a part of it, into one file; the suffix of ``target`` says which format.

    Parameters
    ----------
    section : what to write (``"model"``, ``"model/encoder"``); all by default. ``.safetensors`` holds tensors alone,
        by their keys joined with dots: there a section is usually wanted.

    Raises
    ------
    AlreadyExistsError : the file is there. UnsupportedFormatError : another suffix. SchemaError : a section without
    tensors, or whose tensors the format does not know.
    """
    target = Path(target)
    if target.exists():
        raise AlreadyExistsError(f"{target} exists", hint="remove it, or choose another name")
    if target.suffix not in (".pt", ".pth", ".safetensors"):
        raise UnsupportedFormatError(f"{target} has no suffix that is known here", hint=".pt or .safetensors")
    folder = open_folder(path)
    if not isinstance(folder, OwnFolder):
        raise UnsupportedFormatError(
            f"{folder.kind} checkpoints are files of their own already: {find(folder, which).path}"
        )
    checkpoint = find(folder, which)
    reader = Reader(folder.storage.child(checkpoint.name), folder.shelf.record(checkpoint.name), folder.pool)
    state = reader.part(tuple(filter(None, section.split("/"))))
    if target.suffix == ".safetensors":
        pieces = _safetensors(state, {"step": str(checkpoint.step), "section": section})
    else:
        buffer = io.BytesIO()
        tensors.import_torch().save(state, buffer)
        pieces = [buffer.getbuffer()]
    parent, name = os.path.split(os.path.abspath(target))
    storage = LocalStorage(parent)
    ensure_folder(storage, "")
    publish_file(storage, name, pieces)
    return str(target)


def _safetensors(state: Any, metadata: dict[str, str]) -> list[Any]:
    flat = _flatten(state)
    if not flat:
        raise SchemaError("there are no tensors to write", hint="name a section: --section model")
    header: dict[str, Any] = {"__metadata__": metadata}
    pieces: list[Any] = [b""]
    offset = 0
    for name, value in flat.items():
        if tensors.is_tensor(value):
            value = value.detach().resolve_conj().resolve_neg().contiguous()
            dtype = tensors.dtype_name(value)
            data = value.flatten().view(tensors.import_torch().uint8).numpy() if value.numel() else b""
        else:
            dtype, data = value.dtype.name, value.tobytes()
        if dtype not in _SAFE:
            raise SchemaError(f"{name} is of dtype {dtype}, which safetensors does not know", hint="export to .pt")
        size = len(data)
        header[name] = {"dtype": _SAFE[dtype], "shape": list(value.shape), "data_offsets": [offset, offset + size]}
        pieces.append(data)
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pieces[0] = struct.pack("<Q", len(text)) + text
    return pieces


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if tensors.is_tensor(value) or (hasattr(value, "dtype") and hasattr(value, "tobytes") and value.ndim >= 0):
        return {prefix or "tensor": value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    flat: dict[str, Any] = {}
    for key, item in items:
        flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat
