"""A sweep's folder on the head node's own disk, for processes that do not see that disk.

Not every cluster has a shared file system. The roster is on the head node and writes there; whoever
is elsewhere (a trainer on another node, a laptop) opens the same folder as a `HeadFolder`, whose
every call is a task on the head. Paths that all nodes see, and object stores, need none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ray

from saeray.actors.nodes import is_head, on_head
from saeray.files.storage import Folder

MARKER = "disk.txt"  # in .ray/: what a process must find there to be looking at the head's disk


def seen_from_here(uri: str, marker: str | None = None) -> Folder:
    """The folder, directly where this process sees the disk it is on, else through the head.

    marker: what the roster has written into `.ray/disk.txt`. Without one, only the head node itself
    is taken to see it.
    """
    folder = Folder.at(uri)
    if not folder.is_local or is_head():
        return folder
    if marker is not None:
        try:
            if (folder / ".ray").read(MARKER).decode() == marker:
                return folder
        except OSError:
            pass  # another disk
    return HeadFolder(folder)


class HeadFolder(Folder):
    """`Folder`, with the head node's eyes."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder.filesystem, folder.path, folder.uri)

    def __truediv__(self, name: str) -> Folder:
        return HeadFolder(super().__truediv__(name))

    def exists(self) -> bool:
        return self.there(Folder.exists)

    def names(self) -> list[str]:
        return self.there(Folder.names)

    def files(self) -> dict[str, int]:
        return self.there(Folder.files)

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        return self.there(Folder.read, name, start, length)

    def write(self, name: str, data: bytes) -> None:
        self.there(Folder.write, name, data)

    def delete(self) -> None:
        self.there(Folder.delete)

    def publish(self, files: Mapping[str, bytes]) -> None:
        self.there(Folder.publish, dict(files))

    def there(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """The method's result on the head node; repeated when its worker dies.

        Raises:
            OSError: as the method does there.
        """
        if not ray.is_initialized():
            raise OSError(f"{self.uri} is on the head node's disk, and Ray is not connected")
        task = ray.remote(on_this_disk).options(
            num_cpus=0, max_retries=3, scheduling_strategy="DEFAULT", **on_head()
        )
        outcome = ray.get(task.remote(method.__name__, self.path, *arguments), timeout=TASK_SECONDS)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome


TASK_SECONDS = 300.0  # for one call: a checkpoint of gigabytes takes a while


def on_this_disk(method: str, path: str, *arguments: Any) -> Any:
    """Runs a method of `Folder` here; its OSError is an answer, not a failed task."""
    try:
        return getattr(Folder.at(path), method)(*arguments)
    except OSError as error:
        return type(error)(*error.args)
