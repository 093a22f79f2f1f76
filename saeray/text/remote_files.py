"""Files behind a URI, so that `datasets` can read them: through the file systems of results.

`datasets` opens URLs by fsspec. Where pyarrow has the file system of a scheme (s3, gs, hdfs, abfs),
fsspec is shown that one, so that text is read with the same keys and endpoints that results are
written with, and needs no further package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import fs

from saeray.errors import bad_value
from saeray.text.filesystem import filesystem_of


def is_remote(path: str) -> bool:
    """Whether a dataset is named by a URI."""
    return "://" in path


class Mounted(NamedTuple):
    """A place that `datasets` can read from."""

    scheme: str
    folder: str  # its path in the file system
    files: list[Path]  # of every file below it, from there on
    is_file: bool  # it is one file, not a folder

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.folder}"

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"


def mounted(uri: str, field: str) -> Mounted:
    """Opens a URI, which stands in `field`.

    Raises:
        ConfigError: nothing there, no access to it, or a scheme that nothing here reads.
    """
    scheme = uri.partition("://")[0]
    filesystem, path = filesystem_of(uri, field)
    try:
        info = filesystem.get_file_info(path)
        if info.is_file:
            paths = [path]
        else:
            selector = fs.FileSelector(path, allow_not_found=True, recursive=True)
            paths = [i.path for i in filesystem.get_file_info(selector) if i.is_file]
    except (OSError, ValueError, ImportError) as error:
        raise bad_value(field, uri, f"can't be read ({type(error).__name__}: {error}).") from None
    if not paths:
        raise bad_value(field, uri, "there is no such file or folder, or nothing in it.")
    if not (isinstance(filesystem, fs.PyFileSystem)):
        show_to_fsspec(scheme, filesystem)
    folder = path.rpartition("/")[0] if info.is_file else path.rstrip("/")
    if scheme in ("http", "https"):  # whose paths are URLs
        folder = folder.partition("://")[2]
        paths = [p.partition("://")[2] for p in paths]
    files = sorted(Path(p).relative_to(folder) for p in paths)
    return Mounted(scheme, folder, files, info.is_file)


def show_to_fsspec(scheme: str, filesystem: fs.FileSystem) -> None:
    """From now on fsspec reads this scheme's URLs, in this process, through that file system."""
    import fsspec
    from fsspec.implementations.arrow import ArrowFSWrapper

    class ThroughArrow(ArrowFSWrapper):
        protocol = scheme
        cachable = False

        def __init__(self, **_: Any) -> None:
            super().__init__(filesystem)

        @classmethod
        def _strip_protocol(cls, path: Any) -> Any:
            if isinstance(path, list):
                return [cls._strip_protocol(p) for p in path]
            return str(path).removeprefix(f"{scheme}://").rstrip("/")

    fsspec.register_implementation(scheme, ThroughArrow, clobber=True)
