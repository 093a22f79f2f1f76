"""A folder on local disk, NFS, s3:// or gs://, through pyarrow.fs (or fsspec, for other schemes).

Everything is published whole: on a local file system a file or folder is written beside its place
and renamed into it; on an object store, where a put is atomic, the file named last is the marker.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pyarrow import fs

from saeray.text.filesystem import filesystem_of


class Folder:
    """One folder; `/` gives those below it."""

    def __init__(self, filesystem: fs.FileSystem, path: str, uri: str) -> None:
        self.filesystem = filesystem
        self.path = path
        self.uri = uri

    @classmethod
    def at(cls, uri: str | os.PathLike[str], field: str = "storage_path") -> Folder:
        """Opens a path or URI, which stands in `field`; nothing is created yet.

        Raises:
            ConfigError: a scheme that neither pyarrow nor fsspec knows, no access to it, or a
                secret in the URI.
        """
        text = os.fspath(uri)
        if "://" not in text:
            path = str(Path(text).expanduser().absolute())
            return cls(fs.LocalFileSystem(), path, path)
        filesystem, path = filesystem_of(text, field)
        return cls(filesystem, path, text.rstrip("/"))

    def __truediv__(self, name: str) -> Folder:
        place, mark, query = self.parts
        return Folder(
            self.filesystem,
            str(PurePosixPath(self.path) / name),
            f"{place.rstrip('/')}/{name}{mark}{query}",
        )

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def parent_uri(self) -> str:
        place, mark, query = self.parts
        return place.rstrip("/").rpartition("/")[0] + mark + query

    @property
    def parent(self) -> Folder | None:
        """The folder that it lies in; None of a bucket, or of the root."""
        if "/" not in self.path.strip("/"):
            return None
        return Folder(self.filesystem, str(PurePosixPath(self.path).parent), self.parent_uri)

    @property
    def parts(self) -> tuple[str, str, str]:
        """The URI, `?`, and what says where the store is: its endpoint, a region."""
        # In a path on this machine `?` is a character like any other.
        return self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def exists(self) -> bool:
        return self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound

    def names(self) -> list[str]:
        """Names of what lies directly in it; none when it does not exist."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def numbers(self) -> list[int]:
        """The names in it that are whole numbers, the largest first."""
        return sorted((int(n) for n in self.names() if re.fullmatch(r"[0-9]+", n)), reverse=True)

    def files(self) -> dict[str, int]:
        """Every file below it, by its path from here, with its size in bytes."""
        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        root = PurePosixPath(self.path)
        return {
            str(PurePosixPath(info.path).relative_to(root)): info.size
            for info in self.filesystem.get_file_info(selector)
            if info.is_file
        }

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """The bytes of one file, or `length` of them from `start` on."""
        with self.filesystem.open_input_file(str(PurePosixPath(self.path) / name)) as file:
            if start:
                file.seek(start)
            return file.read(length)

    def write(self, name: str, data: bytes) -> None:
        """One file, there whole or not at all."""
        self.filesystem.create_dir(self.path, recursive=True)
        target = str(PurePosixPath(self.path) / name)
        written = f"{target}.{uuid.uuid4().hex[:8]}.tmp" if self.is_local else target
        with self.filesystem.open_output_stream(written) as stream:
            stream.write(data)
        if written != target:
            os.replace(written, target)

    def delete(self) -> None:
        """The folder and all in it; nothing when it is not there."""
        if self.exists():
            self.filesystem.delete_dir(self.path)

    def publish(self, files: Mapping[str, bytes]) -> None:
        """The folder with exactly these files; the last one marks it as complete."""
        if not self.is_local:
            for name, data in files.items():
                self.write(name, data)
            return
        beside = Path(f"{self.path}.{uuid.uuid4().hex[:8]}.tmp")
        beside.mkdir(parents=True)
        for name, data in files.items():
            (beside / name).write_bytes(data)
        if Path(self.path).exists():
            shutil.rmtree(self.path)
        os.rename(beside, self.path)
