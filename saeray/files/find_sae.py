"""From what a user has of an SAE to its folder: a path, SWEEP/SAE, a result, a name on the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeray.errors import ConfigError, SaerayError, bad_value, nearest
from saeray.files import hub_repo, strict_json
from saeray.files.checkpoint import load_sae as load_folder
from saeray.files.storage import Folder
from saeray.sae.architectures.base import SAE
from saeray.spec.messages import DONE, STOPPED

CFG = "cfg.json"
POINTER = "sae.json"  # a Tune checkpoint of SAETrial's


def load_sae(where: Any, device: Any = None) -> SAE:
    """The SAE that `where` names, with its `cfg`.

    Args:
        where: the folder of an SAE, ours or sae_lens's (`…/final`, a trial's, a checkpoint's: a
            path, s3://…, gs://…); `SWEEP/SAE`, a sweep's folder and the name of an SAE in it; a row
            of a sweep's results, or the result itself where it has one SAE; what Ray Tune has of a
            trial (a `Result`, its checkpoint or metrics, a `Trial`); or a name on the Hugging Face
            hub: `user/repo`, `user/repo/SAE`, `user/repo@revision/SAE`.
        device: where its tensors shall be (`cuda`, …); default: the CPU.

    Raises:
        ConfigError: there is no SAE, or several; or one that computes what none of ours does.
    """
    place = folder_of(where)
    try:
        sae = load_folder(place)
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{place.uri}: no SAE can be read there: {error}") from None
    return sae if device is None else sae.to(device)


def folder_of(where: Any, field: str = "where") -> Folder:
    """The folder of the SAE that `where`, which stands in `field`, names: see `load_sae`."""
    if isinstance(where, Folder):
        return where
    if hasattr(where, "as_directory"):  # Tune's checkpoint, which looks like a path and is none
        return of_checkpoint(where)
    if isinstance(where, (str, os.PathLike)):
        return named(os.fspath(where), field)
    if isinstance(where, Mapping):  # a row, or a Tune result
        return of_row(where)
    for name in ("metrics", "last_result"):  # a Tune Result, a Trial
        told = getattr(where, name, None)
        if isinstance(told, Mapping) and told.get("path"):
            return of_row(told)
    if getattr(where, "checkpoint", None) is not None:
        return of_checkpoint(where.checkpoint)
    if hasattr(where, "rows") and hasattr(where, "final"):
        trained = [row["trial"] for row in where.rows if row["status"] in (DONE, STOPPED)]
        return where.final(the_only(trained, f"{where.name}: ", "result.load(row) takes one"))
    raise ConfigError(
        f"{type(where).__name__} names no SAE; a path, SWEEP/SAE, a row, a result of a sweep or of "
        "Ray Tune, or a name on the hub is wanted."
    )


def of_row(row: Mapping[str, Any]) -> Folder:
    path = row.get("path")
    if not path or row.get("status", DONE) not in (DONE, STOPPED):
        who, state = row.get("trial", "it"), row.get("status", "not trained")
        raise ConfigError(f"{who}: has no SAE yet ({state}).")
    place = Folder.at(path, "path")
    if "://" not in path and not os.path.isabs(path) and not place.exists():
        raise ConfigError(
            f"{path}: the paths in results.csv are from the sweep's folder: load_sae(f'{{SWEEP}}/"
            '{row["path"]}\'), or load_sweep(SWEEP).rows, which has whole ones.'
        )
    return place


def of_checkpoint(checkpoint: Any) -> Folder:
    """Tune's of a trial points at the SAE: its trained one, or the newest of its checkpoints."""
    with checkpoint.as_directory() as place:
        pointer = Path(place) / POINTER
        if not pointer.is_file():
            raise ConfigError(f"{checkpoint}: not a checkpoint of saeray's trials.")
        told = strict_json.loads(pointer.read_text())
    name = told["name"]
    moved = [Folder.at(p) for p in Path(checkpoint.path).parents if (p / "sweep.yaml").is_file()]
    for uri in (told.get("path"), told["folder"], *((p / "trials" / name).uri for p in moved[:1])):
        found = inside(Folder.at(uri), uri) if uri else None
        if found is not None:
            return found
    raise ConfigError(f"{told['name']}: has no SAE yet.")


def named(text: str, field: str) -> Folder:
    """Of a path, a URI, SWEEP/SAE, or a name on the hub."""
    place = Folder.at(text, field)
    found = inside(place, text)
    if found is None:
        sweep = place.parent
        if sweep is not None and "sweep.yaml" in sweep.names():
            found = inside(sweep / "trials" / place.name, text)
            if found is None:
                there = (sweep / "trials").names()
                said = f"no trained SAE of that name; {nearest(place.name, there)}"
                raise bad_value(field, text, said)
    if found is None and hub_repo.is_name(text) and not place.exists():
        try:
            found = Folder.at(hub_repo.sae_folder(text))
        except SaerayError as error:  # a path with a slip in it looks like a name, too
            raise type(error)(f"{text}: no such folder is here, and {error}") from None
    if found is None:
        kind = "SAE" if place.exists() else "folder"
        raise bad_value(
            field,
            text,
            f"there is no such {kind}: cfg.json is wanted in it (or a sweep's folder, SWEEP/SAE, "
            "or user/repo on the Hugging Face hub).",
        )
    return found


def inside(place: Folder, text: str) -> Folder | None:
    """The folder with an SAE's files that a folder is or holds; None where there is none."""
    names = place.names()
    if CFG in names:
        return place
    if "final" in names and CFG in (place / "final").names():
        return place / "final"
    if "sweep.yaml" in names:
        trials = place / "trials"
        trained = [n for n in trials.names() if CFG in (trials / n / "final").names()]
        return trials / the_only(trained, f"{text}: ", f"{text}/NAME takes one") / "final"
    return None


def the_only(names: list[str], of: str, remedy: str) -> str:
    """Its one name.

    Raises:
        ConfigError: there are none, or several.
    """
    if not names:
        raise ConfigError(f"{of}no SAE of it is trained yet.")
    if len(names) > 1:
        more = ", …" if len(names) > 12 else ""
        raise ConfigError(
            f"{of}there are {len(names)} SAEs: {', '.join(names[:12])}{more}; {remedy}."
        )
    return names[0]
