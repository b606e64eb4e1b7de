"""What limits a row that falls short of its bar, and what was tried; the page shows it where the row does."""

from __future__ import annotations

REMARKS: dict[str, str] = {
    "ingest": "The codec and, before it, packing to uint8 with its check take most of the processors' time; the rest "
    "is the one copy in the caller, which shares two cores with two encoders, and Python for each trajectory and "
    "chunk. The faster the codec, the more the fixed part weighs: hence the share of LZ4's limit is the lower one. "
    "Tried: larger chunks; memory for rows that is used again and touched ahead (on a virtual machine a page's first "
    "write costs more than the codec); a queue of 64 MiB, which takes 8% less time and holds less of a burst.",
    "append": "The caller makes one copy of each field, without letting go of the interpreter's lock, and shares two "
    "cores with two encoder threads: what it waits for is its turn. The percentile is the scheduler's as much as ours: "
    "compare the copies beside busy threads.",
    "commits": "A commit flushes each array's last shard, the table's and the manifest, and while it does so the disk "
    "is not there for the encoders. The share is within the spread of two collections without commits.",
    "amplification": "Rows too few to fill a chunk are written again by the next commit. The back-off lets commits "
    "wait, six intervals at the most; what is written then is kilobytes.",
    "recording": "The peers' pattern clones a tensor for each environment and key; copies of NumPy rows are several "
    "times cheaper than that, and shown beside it.",
    "scan": "All read the same Blosc frames with the same library, so the codec bounds the ratio: with Zstd it takes "
    "most of everybody's time. The lead over zarr-python is its Python work for each chunk.",
    "scan-own": "Their float16 is stored as it is; ours comes back from uint8 through a table, one pass more over "
    "twice the bytes. With chunks of 256 frames zarr-python has next to no work but the codec's.",
    "random": "TensorStore reads chunks of one frame; ours hold two (fast) or four (balanced), a fifth smaller in all "
    "and faster to scan. A chunk of one frame would take the lead here and lose it there.",
    "windows": "A window of 16 frames begins in the midst of a chunk: the rows before it are decoded for nothing. "
    "With Zstd the codec takes most of the time, and it is the peer's codec too.",
    "lazy": "A small key of one route is faster from a routes.npz of moderate size: its pickle holds one tiny array a "
    "route, and opening a store parses a manifest (half a millisecond). Peak memory of ours is that of the frames "
    "asked for and of the decoder, whatever the size of the store, so its ratio grows with the file.",
    "routes": "Import encodes what NumPy only loads: the codec's share cannot be below its own time, and two cores do "
    "it while the next shard is being inflated. Export at equal compression is deflate on either side; ours compresses "
    "keys on both cores.",
    "scale": "Resuming is flushes of the disk (a lock, a manifest, a commit), whatever the number of trajectories. "
    "A filter reads two columns whole.",
    "merge-linked": "Links cost a call each, and the manifest and table are written and flushed; copying here is not "
    "flushed at all, and comes from the page cache.",
    "merge-rewritten": "The codec, where chunks are encoded anew.",
    "hdf5": "Each chunk is checked, moved and flushed; the peer compresses with the same codec.",
    "windows-lowdim": "One gather for each field; what is left is Python for each of them.",
    "replay": "Saving links files, and the calls for it, one for each file, are the time; theirs copies files in 20 "
    "threads. Cached samples are one gather on both sides.",
    "replay-uncached": "Frames are decoded with the default codec; theirs are not compressed, and read whole.",
    "checkpoint-held": "The copy into a prepared arena is bound by memory, as memcpy is; what is more is Python for "
    "each tensor.",
    "checkpoint-stall": "The longest pause is the scheduler's on two cores: compare it with that of nothing at all.",
    "checkpoint-training": "Compression takes a core from the training for a moment; on two cores it is half of them.",
    "checkpoint-size": "Trained float32 has noise in its mantissas; byte shuffle and Zstd take the exponents' share.",
    "checkpoint-restore": "Decompression and checksums of every byte, which torch.load does not do.",
    "checkpoint-listing": "One small file is read for each checkpoint.",
}
