"""Token windows that were made, kept for whoever asks again: in a file of bounded size."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

KEEP_BYTES = 2**30  # of windows; the least recently used go first, and are made again if need be
SEGMENT_BYTES = 2**22
DISK_SHARE = 0.25  # of what is free where the file is


@dataclass
class Segment:
    """Windows that lie together."""

    slot: int  # its place in the file, in segments
    first: int  # window
    stop: int


class WindowStore:
    """Windows by number: int32 [context_size] each."""

    def __init__(self, context_size: int, folder: str | None = None) -> None:
        """folder: where the file is; None: wherever temporary files have most room."""
        self.context_size = context_size
        self.window_bytes = 4 * context_size
        self.per_segment = max(1, SEGMENT_BYTES // self.window_bytes)
        folder = folder or roomiest()
        n_bytes = min(KEEP_BYTES, int(shutil.disk_usage(folder).free * DISK_SHARE))
        self.most = max(4, n_bytes // (self.per_segment * self.window_bytes))  # segments
        self.segments: OrderedDict[int, Segment] = OrderedDict()
        # Without a name, so that it goes with its process however that ends.
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as the object)

    def has(self, window: int) -> bool:
        segment = self.segments.get(window // self.per_segment)
        return segment is not None and segment.first <= window < segment.stop

    def read(self, window: int) -> np.ndarray:
        """A window that it has."""
        segment = self.segments[window // self.per_segment]
        self.segments.move_to_end(window // self.per_segment)
        data = os.pread(self.file.fileno(), self.window_bytes, self.offset(segment, window))
        return np.frombuffer(data, dtype=np.int32)

    def add(self, window: int, ids: np.ndarray) -> None:
        """Takes a window; another one goes where there is no room."""
        at = window // self.per_segment
        segment = self.segments.get(at)
        if segment is None:
            segment = Segment(self.free_slot(), window, window)
        self.segments[at] = segment
        self.segments.move_to_end(at)
        if segment.first <= window < segment.stop:
            return
        try:
            os.pwrite(self.file.fileno(), ids.tobytes(), self.offset(segment, window))
        except OSError:
            del self.segments[at]
            if not self.segments:
                raise
            self.most = len(self.segments)  # the disk is full: what it has by now must do
            self.add(window, ids)
            return
        if window == segment.stop:
            segment.stop += 1
        else:  # made from another place on
            segment.first, segment.stop = window, window + 1

    def free_slot(self) -> int:
        if len(self.segments) >= self.most:
            return self.segments.popitem(last=False)[1].slot
        used = {s.slot for s in self.segments.values()}
        return next(i for i in range(self.most) if i not in used)

    def offset(self, segment: Segment, window: int) -> int:
        place = segment.slot * self.per_segment + window % self.per_segment
        return place * self.window_bytes


def roomiest() -> str:
    """The folder for temporary files with most room; the usual one where it has enough."""
    usual = tempfile.gettempdir()
    if shutil.disk_usage(usual).free * DISK_SHARE >= KEEP_BYTES:
        return usual
    folders = [usual, *(f for f in ("/var/tmp", os.getcwd()) if os.access(f, os.W_OK))]
    return max(folders, key=lambda folder: shutil.disk_usage(folder).free)
