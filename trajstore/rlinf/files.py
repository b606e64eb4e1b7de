"""A batch file, ``.pt`` or ``.pkl``, read without running what it says."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from trajstore.engine.optional import optional
from trajstore.errors import FormatError
from trajstore.media.storage import Storage

_HINT = "nothing was executed; it was not written by the buffer, or is damaged"


def load_batch(storage: Storage, name: str) -> dict[str, Any]:
    """The dict of tensors (nested once for observations) and plain values in a batch file.

    Raises ``FormatError`` for a file that asks for anything but tensors, arrays and plain containers,
    ``MissingDependencyError`` without PyTorch.
    """
    torch = optional("torch", "torch")
    data = storage.read(name)
    place = storage.describe(name)
    try:
        if name.endswith(".pt"):
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        else:
            value = _Unpickler(io.BytesIO(data)).load()
    except FormatError as error:
        raise FormatError(f"{place}: {error.message}", hint=_HINT) from error
    except Exception as error:  # whatever a damaged file makes of the readers
        raise FormatError(f"{place} cannot be read: {error!r:.200}", hint=_HINT) from error
    if not isinstance(value, dict):
        raise FormatError(f"{place} holds no dict, but a {type(value).__name__}")
    return value


def save_batch(storage: Storage, name: str, value: Mapping[str, Any]) -> None:
    """Write a new batch file, its bytes durable. A ``.pkl`` is a pickle, because that is what its readers take."""
    torch = optional("torch", "torch")
    buffer = io.BytesIO()
    if name.endswith(".pt"):
        torch.save(dict(value), buffer)
    else:
        pickle.dump(dict(value), buffer)
    storage.write(name, [buffer.getbuffer()])


class _Unpickler(pickle.Unpickler):
    """Knows tensors, arrays and plain containers, and looks up no other name."""

    def find_class(self, module: str, name: str) -> Any:
        torch = optional("torch", "torch")
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _storage_from_bytes
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return torch._utils._rebuild_tensor_v2
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _NUMPY:
            return super().find_class(module if _has_old_core() else module.replace("numpy.core", "numpy._core"), name)
        raise FormatError(
            f"it asks for {module[:100]}.{name[:100]}, and only tensors, arrays and plain values are read"
        )


_NUMPY = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


def _has_old_core() -> bool:
    import numpy as np

    return np.lib.NumpyVersion(np.__version__) < "2.0.0"


def _storage_from_bytes(data: bytes) -> Any:
    """What PyTorch's function of this name does, but for running what the bytes say."""
    return optional("torch", "torch").load(io.BytesIO(data), weights_only=True)
