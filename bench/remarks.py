"""What limits a row that falls short of its bar, and what was tried; the page shows it where the row does."""

from __future__ import annotations

REMARKS: dict[str, str] = {
    "ingest": "At `fast` the codec is a quarter of the processors' time (see the profile); pages that are written for "
    "the first time, the page cache, packing with its check, and Python for each trajectory and chunk are the rest. "
    "The codec alone would be some 23 times as fast as the peer. Tried: larger chunks, a smaller queue, memory for "
    "rows that is used again and touched ahead.",
    "append": "Both copy each field once; the peer into memory that is in the cache, because the copy before has just "
    "left it there, `append` into the queue's, which is not. Beyond that it wakes encoders, and waits for its turn "
    "while they hold both cores or the interpreter's lock; Python itself is some 20 µs (`append-small`).",
    "commits": "A commit encodes rows that fill no chunk yet, once more than a collection without commits does, and "
    "flushes several files; most of the difference is processor time (the column CPU), not waiting for the disk.",
    "amplification": "Rows too few to fill a chunk are written again by the next commit. The back-off lets commits "
    "wait, six intervals at the most; what is written then is kilobytes.",
    "recording": "Ours takes hardly longer than bare copies; how many times that a loop takes is the loop's pace, "
    "66 ms a step where the bar was set.",
    "scan": "zarrs and this reader take the same processor time (the column CPU) for the same frames with the same "
    "codec; TensorStore takes more, but not as much more as the bar asks.",
    "scan-own": "zarr-python has chunks of 256 frames here, hence next to no Python, and stores float16 as it is; ours "
    "comes back from uint8 through a table, one pass more over all of it (the profile's unpacking).",
    "random": "TensorStore's chunks are one frame; ours are two (fast) or four (balanced), all decoded for one of "
    "them. Chunks half as large take 0.75 to 0.8 of the time here, 11% more bytes, and longer everywhere else. Of the "
    "processor time in LZ4 the codec is a third, unpacking to float16 a fifth, the lock's and Python's share a "
    "quarter. Tried: only one thread reading at a time, 4 to 12% less, but a cold disk would see one read at a time.",
    "windows": "64 windows meet some 540 chunks of two frames (fast), half as many of four (balanced), all checked; "
    "the peers' are 16 and 8 frames, chosen for this row. The codec and unpacking to float16, which is one pass more "
    "than theirs, are each a third of the processor time in LZ4.",
    "lazy": "A small key is one small member of the file: all of it takes a few milliseconds and half a megabyte, and "
    "so does opening a store. For frames, ours takes the memory of those asked for and of a decoder, whatever the "
    "size of the file.",
    "routes": "Import inflates what NumPy inflates, and encodes it besides: of its processor time 30% is inflating, "
    "43% packing, encoding and checksums, 21% taking pickles apart and appending, 5% writing. That is two to three "
    "times NumPy's (the column CPU), and two processors make up for some of it. Tried: inflating with ISA-L, a fifth "
    "less in all, but one more package; fewer steps for a pickle and a shorter memory of it, 2% at the most.",
    "scale": "Resuming is flushes of the disk (a lock, a manifest, a commit), whatever the number of trajectories. "
    "A filter reads two columns whole.",
    "merge-linked": "The merge takes some 50 ms whatever the bytes: a call for each link, a dozen manifests and "
    "tables, and the flushes; copying 2 GB from page cache to page cache, never flushed, took 0.6 s in this run and "
    "2 s in another, where the machine had no memory at hand.",
    "merge-rewritten": "The codec, where chunks are encoded anew.",
    "hdf5": "Each chunk is checked, moved and flushed; the peer compresses with the same codec.",
    "windows-lowdim": "Both do one gather for each field. The 48 ms against which the bar was set were not met here: "
    "without the index that it keeps (`cache_values`, as its documentation advises) the sampler takes 1.4 times as "
    "long, not 40 times.",
    "replay": "Saving links files, one call for each, while theirs copies files in 20 threads; each `add` here is "
    "durable with the next commit, theirs is not flushed.",
    "replay-uncached": "Frames are decoded with the default codec; theirs are not compressed, and read whole.",
    "checkpoint-held": "The copy runs at memcpy's pace, and nothing that copies could take less; how many times that a "
    "deepcopy or torchrl.checkpoint takes is theirs. A lazy save neither copies nor waits: half a "
    "millisecond of processor with cold caches (0.14 with warm ones), of which torch's state_dict()s take 0.23, the "
    "random generators' states 0.12, and our look at each tensor 0.09.",
    "checkpoint-stall": "The longest pause is the scheduler's on two cores: compare it with that of nothing at all.",
    "checkpoint-training": "The loop waits 7 ms a save, copies included; what is more is the traffic of the core that "
    "compresses, in the memory and caches that both share.",
    "checkpoint-size": "Trained float32 has noise in its mantissas; byte shuffle and Zstd take the exponents' share.",
    "checkpoint-restore": "Decompression and checksums of every byte, which torch.load does not do.",
    "checkpoint-listing": "One small file is read for each checkpoint.",
}
