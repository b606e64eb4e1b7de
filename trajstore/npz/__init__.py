"""NumPy's ``.npz``: read without running what it says, written without holding what it holds.

Two things are missing in NumPy for files of 30–150 GB whose every key is an
object array, one pickle: reading such a key element by element, and writing
it so.  Both are possible, because a pickle is a sequence of small instructions
that this package carries out, or gives out, itself.

* :class:`NpzReader` takes arrays and plain values only; a file that names
  anything else is refused and nothing of it is executed.
* :class:`NpzWriter` compresses on all cores, and the bytes of a file are a
  pure function of what is in it.

What is written is read by plain ``np.load(path, allow_pickle=True)``, under NumPy 1.26 and 2.x.
"""

from __future__ import annotations

from trajstore.npz.reader import Member, NpzReader
from trajstore.npz.writer import NpzWriter

__all__ = ["Member", "NpzReader", "NpzWriter"]
