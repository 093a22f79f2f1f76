"""Model repositories of the Hugging Face hub: what is asked of them, in huggingface_hub's calls.

Who asks is known by HF_TOKEN or `hf auth login`, and where by HF_ENDPOINT, as everywhere; a token
is in no argument here, in no file and in no message.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from saeray.errors import ConfigError, SaerayError, bad_value

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SAE_FILES = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
PART = r"[A-Za-z0-9][\w.-]*"
NAME = re.compile(rf"(?P<repo>{PART}/{PART})(@(?P<revision>[\w.-]+))?(/(?P<inside>.+))?")


class Name(NamedTuple):
    """`user/repo`, `user/repo@revision`, and what is meant in it."""

    repo: str
    revision: str | None
    inside: str  # a folder in it; "": the whole


def is_name(text: str) -> bool:
    return NAME.fullmatch(text) is not None


def parsed(text: str, field: str = "REPO") -> Name:
    """Raises a `ConfigError` where a text is no name on the hub."""
    found = NAME.fullmatch(text)
    if found is None:
        raise bad_value(field, text, "user/repo is wanted, a name on the Hugging Face hub.")
    return Name(found["repo"], found["revision"], (found["inside"] or "").strip("/"))


@contextmanager
def asking(repo: str) -> Iterator[HfApi]:
    """huggingface_hub's API, its errors in words.

    Raises:
        ConfigError: no such repository or revision, or no right to it. SaerayError: no answer.
    """
    from huggingface_hub import HfApi, errors, get_token

    api = HfApi(library_name="saeray")
    where = f"{repo} on {api.endpoint}"
    known = "HF_TOKEN, or `hf auth login`" + (
        "; the one in use has no right to it" if get_token() else ", gives a token"
    )
    try:
        yield api
    except errors.RevisionNotFoundError:
        raise ConfigError(f"{where}: has no such revision.") from None
    except errors.RepositoryNotFoundError:  # a private one looks the same
        said = f"there is no such repository, or it is private ({known})."
        raise ConfigError(f"{where}: {said}") from None
    except errors.HFValidationError as error:
        raise ConfigError(f"{where}: {error}") from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise ConfigError(f"{where}: not allowed ({known}).") from None
        raise SaerayError(f"{where}: {error.server_message or error}") from None
    except (errors.LocalEntryNotFoundError, errors.HTTPError, OSError) as error:
        raise SaerayError(f"{where}: can't be reached: {error}") from None


def files_of(name: Name) -> list[str]:
    """The paths of all files in a repository."""
    with asking(name.repo) as api:
        info = api.model_info(name.repo, revision=name.revision)
        return [file.rfilename for file in info.siblings or ()]


def fetched(name: Name, path: str) -> Path:
    """One file of it, in huggingface_hub's cache; asked for again only where it has changed."""
    with asking(name.repo) as api:
        return Path(api.hf_hub_download(name.repo, path, revision=name.revision))


def sae_folder(text: str) -> str:
    """The folder, in huggingface_hub's cache, of the SAE that `user/repo[@revision][/SAE]` names.

    Raises:
        ConfigError: there is none there, or several.
    """
    name = parsed(text)
    wanted = [f"{name.inside}/", f"{name.inside}/final/"] if name.inside else [""]
    try:
        files = files_of(name)
    except ConfigError:
        raise
    except SaerayError:  # without a net: as it was when it was last loaded
        kept = [found for prefix in wanted if (found := in_cache(name, f"{prefix}cfg.json"))]
        if kept:
            return kept[0]
        raise
    for prefix in wanted:
        if f"{prefix}cfg.json" in files:
            return folder_with(name, files, prefix)
    inside = [
        str(PurePosixPath(f).parent)
        for f in files
        if PurePosixPath(f).name == "cfg.json" and f.startswith(wanted[0])
    ]
    if len(inside) == 1:
        return folder_with(name, files, f"{inside[0]}/")
    if not inside:
        raise ConfigError(f"{text}: no SAE is there; a folder with cfg.json is one.")
    more = ", …" if len(inside) > 12 else ""
    raise ConfigError(
        f"{text}: there are {len(inside)} SAEs: {', '.join(inside[:12])}{more}; "
        f"{name.repo}/NAME takes one."
    )


def in_cache(name: Name, path: str) -> str | None:
    """The folder of a file that was brought before."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name.repo, path, revision=name.revision)
    return str(Path(found).parent) if isinstance(found, str) else None


def folder_with(name: Name, files: Sequence[str], prefix: str) -> str:
    for file in SAE_FILES:
        if f"{prefix}{file}" in files:
            fetched(name, f"{prefix}{file}")
    return str(fetched(name, f"{prefix}cfg.json").parent)


def there(repo: str, paths: Sequence[str]) -> dict[str, bytes]:
    """Those of these files that a repository has now; none where there is no such repository."""
    from huggingface_hub import errors

    with asking(repo) as api:
        try:
            info = api.model_info(repo)
        except errors.RepositoryNotFoundError:
            return {}
        has = {file.rfilename for file in info.siblings or ()}
        found = {p: api.hf_hub_download(repo, p, revision=info.sha) for p in paths if p in has}
        return {path: Path(place).read_bytes() for path, place in found.items()}


Parts = Iterable[Mapping[str, bytes | Path]]  # files by their path in a repository


def published(repo: str, parts: Parts, message: str, private: bool | None) -> str:
    """One commit with these files in a repository, made where there is none yet; its address.

    The large files of one part are sent before the next part is asked for.

    private: None leaves it to the hub (public, unless the account says otherwise).
    """
    from huggingface_hub import CommitOperationAdd

    with asking(repo) as api:
        made = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise ConfigError(
                f"{made}: is public already; make it private there, or name another repository."
            )
        added = []
        for files in parts:
            new = [CommitOperationAdd(path_in_repo=p, path_or_fileobj=d) for p, d in files.items()]
            api.preupload_lfs_files(repo, new)
            added += new
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")
            api.create_commit(repo, added, commit_message=message)
        return str(made)


def brought(name: Name, wanted: Mapping[str, str], folder: Path) -> None:
    """Files of a repository, by their path there, to their paths in a folder."""
    with asking(name.repo) as api:
        revision = api.repo_info(name.repo, revision=name.revision).sha
        for path, place in wanted.items():
            found = api.hf_hub_download(name.repo, path, revision=revision)
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, target)
