"""A training state as a structure that is JSON and extents that are bytes, and back.

A state is any nesting of dicts, lists and tuples. What has bytes (tensors, arrays, ``bytes``, files) becomes an
*extent*: a run of bytes of one dtype in one section; a section is a key of the state's top level that holds more than
one tensor (those that stand there alone are in the section ``state``). Tensors that lie in
one storage become one extent, so that what was shared, or a view, is so again. All else, and where each tensor
lies, is the structure.

Structure: plain values stand for themselves; a list is a node, its first element says which:
``["dict", key, node, ...]``, ``["ordered", metadata, key, node, ...]``, ``["list", node, ...]``, ``["tuple", ...]``,
``["value", value]``, ``["tensor", extent, dtype, byte offset, size, stride, flag]``,
``["array", extent, dtype, shape, order]``, ``["bytes", extent]``, ``["file", extent, name]``, ``["size", ...]``,
``["dtype", name]``, ``["device", name]``.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trajstore.checkpoint import tensors
from trajstore.checkpoint.tensors import Bytes
from trajstore.errors import FormatError, NotFoundError, SchemaError

BYTES = "bytes"
"""The dtype of extents without one: ``bytes``, files, strings arrays, structured arrays."""

_DEFAULT_SECTION = "state"
_PLAIN = frozenset((str, int, float, bool, type(None)))
_NATIVE = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()
)


@dataclass(frozen=True)
class File:
    """A file that travels in a checkpoint as bytes, checksummed and never looked into: a pickle of another system,
    say. It is read when the checkpoint is saved, and comes back as a :class:`FileContent`."""

    path: Path | str


class FileContent(bytes):
    """The bytes of a file that was saved, and ``name``, its last path component."""

    name: str = ""


def read_folder(path: Path | str) -> dict[str, Any]:
    """All files in a folder, nested as they are, for a state; :func:`write_folder` writes them back."""
    return {child.name: read_folder(child) if child.is_dir() else File(child) for child in sorted(Path(path).iterdir())}


def write_folder(files: Mapping[str, Any], path: Path | str) -> None:
    """Write what :func:`read_folder` read into a new folder."""
    target = Path(path)
    target.mkdir(parents=True)
    for name, value in files.items():
        if Path(name).name != name:
            raise FormatError(f"a file in a checkpoint is called {name!r:.200}: that is no file name")
        if isinstance(value, Mapping):
            write_folder(value, target / name)
        else:
            (target / name).write_bytes(value)


@dataclass(slots=True)
class Extent:
    """Bytes of a state: ``[start, stop)`` of where they lie now (a storage, an array, a bytes object).

    source : a tensor, an ndarray or bytes; it keeps the memory alive. unit : bytes of an element. limit : bytes that
    the source has. address : of its first byte, 0 where it is not on the host. storage : tells one tensor's storage
    from another's, 0 for what is no tensor.
    """

    section: str
    dtype: str
    start: int
    stop: int
    source: Any
    unit: int
    limit: int
    address: int = 0
    storage: int = 0

    @property
    def size(self) -> int:
        return self.stop - self.start


Path_ = Any
"""Where a walk is: ``None`` at the top, else (where it was, key); written out only for a message."""


def show(path: Path_) -> str:
    """``$.model[0]``."""
    if path is None:
        return "$"
    above, key = path
    return f"{show(above)}[{key}]" if isinstance(key, int) else f"{show(above)}.{key}"


class Flattening:
    """One walk over a state: ``node`` is its structure, ``extents`` what has bytes.

    Parameters
    ----------
    state : the tree. Objects with ``state_dict()`` (modules, optimizers, schedulers) stand for what it returns.
    section : the section of all, or ``None`` to make each key of the top level one.

    Raises
    ------
    SchemaError : something that a checkpoint does not hold; names the path to it, and what to do.
    """

    def __init__(self, state: Any, section: str | None = None) -> None:
        self.extents: list[Extent] = []
        self._storages: dict[int, int] = {}
        self._objects: dict[int, Any] = {}  # id: node; also keeps no object twice
        self._alive: list[Any] = []
        self._above: set[int] = set()
        torch = sys.modules.get("torch")
        self._plain_tensor = torch.Tensor if torch is not None else None
        self._strided = torch.strided if torch is not None else None
        self._dtypes = tensors.known_dtypes()
        self._section = section or _DEFAULT_SECTION
        if section is None and type(state) in (dict, OrderedDict) and all(type(key) is str for key in state):
            self.node: Any = self._top(state)
        else:
            self.node = self._node(state, None)

    def _top(self, state: dict[str, Any]) -> Any:
        node: list[Any] = ["dict"]
        if type(state) is OrderedDict:
            metadata = getattr(state, "_metadata", None)
            node = ["ordered", None if metadata is None else self._node(metadata, (None, "_metadata"))]
        for key, value in state.items():
            # A tensor alone makes no section: a module's state dict given as the whole state would make thousands.
            alone = isinstance(value, np.ndarray) or tensors.is_tensor(value)
            self._section = _DEFAULT_SECTION if alone else key
            node += (key, self._node(value, (None, key)))
        return node

    def add(self, section: str, value: Any) -> Any:
        """Walk something beside the state, in a section of its own; returns its structure."""
        self._section = section
        return self._node(value, (None, section))

    def finish(self) -> list[Extent]:
        """The extents, each widened to whole elements of its dtype."""
        for extent in self.extents:
            if extent.unit > 1:
                extent.start -= extent.start % extent.unit
                extent.stop += -extent.size % extent.unit
        return self.extents

    def _node(self, value: Any, path: Path_) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is self._plain_tensor:
            return self._tensor(value, path)
        walk = self._WALKS.get(kind)
        if walk is not None:
            return self._container(walk, value, path)
        if tensors.is_tensor(value):
            return self._tensor(value, path)
        return self._other(value, kind, path)

    def _container(self, walk: Callable[[Flattening, Any, Path_], Any], value: Any, path: Path_) -> Any:
        identity = id(value)
        if identity in self._above:
            raise SchemaError(f"{show(path)} contains itself")
        self._above.add(identity)
        try:
            return walk(self, value, path)
        finally:
            self._above.discard(identity)

    def _dict(self, value: dict[Any, Any], path: Path_) -> Any:
        node: list[Any] = ["dict"]
        for key, item in value.items():
            node.append(key if type(key) in (str, int) else self._key(key, path))
            node.append(self._node(item, (path, key)))
        return node

    def _ordered(self, value: OrderedDict[Any, Any], path: Path_) -> Any:
        metadata = getattr(value, "_metadata", None)  # what a module's state dict says of its layers' versions
        node = ["ordered", None if metadata is None else self._node(metadata, (path, "_metadata"))]
        return node + self._dict(value, path)[1:]

    def _list(self, value: list[Any], path: Path_) -> Any:
        return ["list", *(self._node(item, (path, i)) for i, item in enumerate(value))]

    def _tuple(self, value: tuple[Any, ...], path: Path_) -> Any:
        return ["tuple", *(self._node(item, (path, i)) for i, item in enumerate(value))]

    def _key(self, key: Any, path: Path_) -> Any:
        if isinstance(key, (bool, float, bytes, tuple, type(None), np.generic)):
            return key
        raise SchemaError(
            f"{show(path)} has a key of type {type(key).__name__}", hint="strings, numbers and tuples can be keys"
        )

    def _tensor(self, tensor: Any, path: Path_) -> Any:
        known = self._dtypes.get(tensor.dtype)
        if known is None or tensor.layout is not self._strided or tensor.is_meta:
            known = tensors.check_tensor(tensor, show(path))
        dtype, unit, is_complex = known
        flag = None
        if tensor.requires_grad or type(tensor) is not self._plain_tensor:
            tensors.check_tensor(tensor, show(path))
            flag = [type(tensor).__name__, tensor.requires_grad]
            tensor = tensor.detach()
        if tensor.is_neg() or (is_complex and tensor.is_conj()):
            tensor = tensor.resolve_conj().resolve_neg()
        contiguous = tensor.is_contiguous()
        start, stop = tensors.hull(tensor, unit, contiguous)
        storage = tensor.untyped_storage()
        key = storage._cdata
        index = self._storages.get(key)
        if index is None:
            index = self._storages[key] = len(self.extents)
            address = storage.data_ptr() if tensor.is_cpu else 0
            self.extents.append(Extent(self._section, dtype, start, stop, tensor, unit, storage.nbytes(), address, key))
        elif stop > start:
            extent = self.extents[index]
            if extent.start == extent.stop:
                extent.start, extent.stop = start, stop
            extent.start, extent.stop = min(extent.start, start), max(extent.stop, stop)
        stride = None if contiguous else list(tensor.stride())
        return ["tensor", index, dtype, start, list(tensor.shape), stride, flag]

    def _array(self, value: np.ndarray[Any, Any], path: Path_) -> Any:
        if id(value) in self._objects:
            return self._objects[id(value)]
        if value.dtype.hasobject:
            raise SchemaError(
                f"{show(path)} is an array of Python objects", hint="save a list, or an array of a plain dtype"
            )
        order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
        flat = np.ascontiguousarray(value.T if order == "F" else value)
        name = value.dtype.name if value.dtype.name in _NATIVE and value.dtype.isnative else BYTES
        node = ["array", self._add(name, flat, flat.itemsize if name != BYTES else 1), _dtype_text(value.dtype),
                list(value.shape), order]  # fmt: skip
        self._objects[id(value)] = node
        self._alive.append(value)
        return node

    def _bytes(self, value: bytes, path: Path_) -> Any:
        return ["bytes", self._add(BYTES, value, 1)]

    def _file(self, value: File, path: Path_) -> Any:
        try:
            content = Path(value.path).read_bytes()
        except OSError as error:
            raise NotFoundError(f"{show(path)}: the file {value.path} cannot be read: {error.strerror}") from error
        return ["file", self._add(BYTES, content, 1), Path(value.path).name]

    def _file_content(self, value: FileContent, path: Path_) -> Any:
        return ["file", self._add(BYTES, value, 1), value.name]

    def _add(self, dtype: str, source: Any, unit: int) -> int:
        is_array = isinstance(source, np.ndarray)
        size = source.nbytes if is_array else len(source)
        address = source.ctypes.data if is_array else 0
        self.extents.append(Extent(self._section, dtype, 0, size, source, unit, size, address))
        return len(self.extents) - 1

    def _other(self, value: Any, kind: type, path: Path_) -> Any:
        if isinstance(value, (np.generic, complex, frozenset)) or kind is set:
            return ["value", value if kind is not set else set(value)]
        torch = sys.modules.get("torch")
        if torch is not None:
            if kind is torch.Size:
                return ["size", *value]
            if kind is torch.dtype:
                return ["dtype", str(value)[6:]]
            if kind is torch.device:
                return ["device", str(value)]
        state_dict = getattr(value, "state_dict", None)
        if callable(state_dict) and not isinstance(value, type):
            return self._node(state_dict(), path)
        if isinstance(value, Mapping) and kind.__module__ == "collections":
            raise SchemaError(f"{show(path)} is a {kind.__name__}", hint="save dict(...) of it")
        raise SchemaError(
            f"{show(path)} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint does not hold",
            hint="save its state_dict(), or pickle.dumps(...) of it: bytes travel as they are",
        )

    _WALKS: dict[type, Callable[[Flattening, Any, Path_], Any]] = {
        dict: _dict,
        OrderedDict: _ordered,
        list: _list,
        tuple: _tuple,
        np.ndarray: _array,
        bytes: _bytes,
        bytearray: lambda self, value, path: self._bytes(bytes(value), path),
        File: _file,
        FileContent: _file_content,
    }


Provide = Callable[[int], Bytes]
"""The bytes of an extent, by number."""


class Unflattening:
    """A state from its structure.

    Parameters
    ----------
    starts : of each extent, the ``start`` that its tensors' offsets count from.
    provide : gives the bytes of an extent; arrays and tensors lie in them without a copy.
    """

    def __init__(self, starts: list[int], provide: Provide) -> None:
        self._starts = starts
        self._provide = provide
        self._storages: dict[int, Any] = {}
        self._arrays: dict[int, Any] = {}

    def build(self, node: Any) -> Any:
        """The value of a node. Raises ``FormatError`` for one that is none."""
        if not isinstance(node, list):
            return node
        try:
            build = self._BUILDS[node[0]]
        except (KeyError, IndexError, TypeError) as error:
            raise FormatError(f"a checkpoint's structure has an unknown node {str(node)[:80]}") from error
        try:
            return build(self, node)
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            raise FormatError(f"a checkpoint's structure has a malformed node {str(node)[:80]}: {error}") from error

    def _dict(self, node: list[Any]) -> Any:
        return {node[i]: self.build(node[i + 1]) for i in range(1, len(node), 2)}

    def _ordered(self, node: list[Any]) -> Any:
        result = OrderedDict((node[i], self.build(node[i + 1])) for i in range(2, len(node), 2))
        if node[1] is not None:
            result._metadata = self.build(node[1])  # type: ignore[attr-defined]
        return result

    def _tensor(self, node: list[Any]) -> Any:
        _, index, dtype, offset, size, stride, flag = node
        if index not in self._storages:
            self._storages[index] = tensors.storage_over(self._provide(index))
        if stride is None:
            stride, step = [], 1
            for n in reversed(size):
                stride.insert(0, step)
                step *= max(n, 1)
        start = offset - self._starts[index] if _numel(size) else 0
        last = sum((n - 1) * s for n, s in zip(size, stride)) if _numel(size) else -1
        width = tensors.dtype_of(dtype).itemsize
        if start < 0 or start % width or start + (last + 1) * width > self._storages[index].nbytes():
            raise FormatError(f"a tensor {size} of {dtype} lies outside its extent")
        tensor = tensors.tensor_in(self._storages[index], dtype, start, tuple(size), tuple(stride))
        return tensors.as_parameter(tensor, *flag) if flag else tensor

    def _array(self, node: list[Any]) -> Any:
        _, index, dtype, shape, order = node
        if index not in self._arrays:
            array = self._provide(index).view(_dtype_from(dtype))
            self._arrays[index] = array.reshape(shape[::-1]).T if order == "F" else array.reshape(shape)
        return self._arrays[index]

    def _file(self, node: list[Any]) -> Any:
        content = FileContent(self._provide(node[1]).tobytes())
        content.name = str(node[2])
        return content

    _BUILDS: dict[str, Callable[[Unflattening, list[Any]], Any]] = {
        "dict": _dict,
        "ordered": _ordered,
        "list": lambda self, node: [self.build(item) for item in node[1:]],
        "tuple": lambda self, node: tuple(self.build(item) for item in node[1:]),
        "value": lambda self, node: node[1],
        "tensor": _tensor,
        "array": _array,
        "bytes": lambda self, node: self._provide(node[1]).tobytes(),
        "file": _file,
        "size": lambda self, node: tensors.import_torch().Size(node[1:]),
        "dtype": lambda self, node: tensors.dtype_of(node[1]),
        "device": lambda self, node: tensors.import_torch().device(node[1]),
    }


def child(node: Any, path: Iterable[Any]) -> Any:
    """The node below ``node`` at a path of keys and indices. Raises ``NotFoundError`` naming what there is."""
    walked: list[str] = []
    for key in path:
        kind = node[0] if isinstance(node, list) and node else None
        if kind in ("dict", "ordered"):
            first = 1 if kind == "dict" else 2
            keys = node[first::2]
            found = next((i for i, k in enumerate(keys) if k == key or str(k) == str(key)), None)
            choices: Iterable[Any] = keys
            position = None if found is None else first + 2 * found + 1
        elif kind in ("list", "tuple"):
            index = int(key) if str(key).lstrip("-").isdigit() else len(node)
            choices = range(len(node) - 1)
            position = index + 1 if 0 <= index < len(node) - 1 else None
        else:
            choices, position = (), None
        if position is None:
            names = ", ".join(map(str, list(choices)[:20])) or "nothing"
            raise NotFoundError(f"the checkpoint has no {'/'.join([*walked, str(key)])}", hint=f"there is {names}")
        node = node[position]
        walked.append(str(key))
    return node


def extents_of(node: Any) -> set[int]:
    """The numbers of the extents that a node needs."""
    if not isinstance(node, list) or not node:
        return set()
    kind = node[0]
    if kind in ("tensor", "array", "bytes", "file"):
        return {node[1]}
    first = {"dict": 1, "ordered": 2, "list": 1, "tuple": 1}.get(kind)
    found: set[int] = set()
    if kind == "ordered":
        found |= extents_of(node[1])
    if first is not None:
        for item in node[first + 1 :: 2] if kind in ("dict", "ordered") else node[first:]:
            found |= extents_of(item)
    return found


def leaves(node: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """``(path, node)`` of everything below a node that has no nodes of its own, in order."""
    kind = node[0] if isinstance(node, list) and node else None
    if kind in ("dict", "ordered"):
        first = 1 if kind == "dict" else 2
        for i in range(first, len(node), 2):
            yield from leaves(node[i + 1], f"{path}/{node[i]}" if path else str(node[i]))
    elif kind in ("list", "tuple"):
        for i, item in enumerate(node[1:]):
            yield from leaves(item, f"{path}/{i}" if path else str(i))
    else:
        yield path, node


def _numel(size: list[int]) -> int:
    result = 1
    for n in size:
        result *= n
    return result


def _dtype_text(dtype: np.dtype[Any]) -> Any:
    return dtype.str if dtype.names is None else [list(field) for field in dtype.descr]


def _dtype_from(text: Any) -> np.dtype[Any]:
    if isinstance(text, str):
        return np.dtype(text)
    return np.dtype([tuple(tuple(part) if isinstance(part, list) else part for part in field) for field in text])
