"""The file system behind a URI, for text as for results: pyarrow's own, or fsspec's."""

from __future__ import annotations

import re

from pyarrow import fs

from saeray.errors import bad_value


def filesystem_of(uri: str, field: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, which stands in `field`, and the path in it.

    Raises:
        ConfigError: a scheme that neither pyarrow nor fsspec knows, no access to it, or a secret in
            the URI.
    """
    if re.search(r"://[^/]*:[^/]*@|[?&](access_key|secret_key|session_token)=", uri):
        raise bad_value(
            field,
            re.sub(r"://.*", "://…", uri),
            "a key in a URI would be written into the results; use the environment "
            "(AWS_ACCESS_KEY_ID …) or a credentials file.",
        )
    try:
        return fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        try:
            from fsspec.core import url_to_fs

            handler, path = url_to_fs(uri)
            return fs.PyFileSystem(fs.FSSpecHandler(handler)), path
        except (ValueError, ImportError, OSError) as missing:  # a package, say, and which
            raise bad_value(
                field, uri, f"neither pyarrow.fs nor fsspec opens it ({error}; {missing})."
            ) from None
