"""Contexts, logits and neighbours of every feature, as pages: of a command, or of a sweep's end.

One pass over text per stream for all chosen SAEs at once (`stream.feature_pass`), on this machine
or on a cluster; SAEs whose features are there already, from the same weights and as many tokens,
are not read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from saeray.errors import ConfigError, SaerayError, bad_value, nearest
from saeray.files import feature_data, strict_json
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder
from saeray.report import features, features_export, report
from saeray.spec.config import LanguageModelSAERunnerConfig, digest
from saeray.spec.features import BANDS, PER_BAND, VERSION, Wanted
from saeray.spec.grid import SAE
from saeray.spec.messages import DONE, STOPPED
from saeray.spec.plan import by_stream, hook_points_of
from saeray.spec.synthetic import is_synthetic

# Of a stopped SAE there is a final folder, too.
TRAINED = (DONE, STOPPED)


def sweep_and_saes(place: str, open_folder: Callable[[str], Folder]) -> tuple[Folder, str | None]:
    """The sweep's folder, and the SAE that a path names inside it: SWEEP, SWEEP/SAE, or a folder
    of the SAE's.

    Raises:
        ConfigError: there is no sweep.
    """
    folder = open_folder(place.rstrip("/"))
    below: list[str] = []
    for _ in range(4):
        if "sweep.yaml" in folder.names():
            names = [n for n in below if n not in ("trials", "final", feature_data.PLACE)]
            return folder, names[0] if names else None
        below.insert(0, folder.name)
        if not folder.parent_uri or folder.parent_uri == folder.uri:
            break
        folder = open_folder(folder.parent_uri)
    raise ConfigError(
        f"{place}: there is no sweep.yaml in it or above it; the folder of a sweep is wanted, or "
        "SWEEP/SAE."
    )


def chosen_saes(sweep: Folder, given: str | None) -> list[str]:
    """The trained SAEs, or the one that is named.

    Raises:
        ConfigError: it is not one of the sweep's. SaerayError: none is trained.
    """
    rows = SweepFolder(sweep, sweep.name).read_rows()
    trained = [row["trial"] for row in rows if row["status"] in TRAINED]
    if given is not None:
        if given not in trained:
            known = nearest(given, trained) if trained else "none has ended yet."
            raise ConfigError(f"{sweep.uri}: has no trained SAE {given!r}; {known}")
        return [given]
    if not trained:
        raise SaerayError(f"{sweep.uri}: no SAE has finished yet, so there are no features.")
    return trained


class ToGather(NamedTuple):
    """The SAEs whose features are not there yet, or are of other weights or tokens."""

    saes: list[SAE]
    digests: dict[str, str]  # by SAE, of what its features depend on


def to_gather(sweep: Folder, wanted: Wanted) -> ToGather:
    """Reads the weights of all that are wanted.

    Raises:
        ConfigError: SAEs that have no text.
    """
    configs = SweepFolder(sweep, sweep.name).read_configs()
    saes = [SAE(name, configs[name]) for name in wanted.saes]
    refuse_textless(saes)
    digests = {s.name: digest_of(sweep, s, wanted) for s in saes}
    return ToGather([s for s in saes if already(sweep, s.name) != digests[s.name]], digests)


def make(
    sweep: Folder,
    wanted: Wanted,
    say: Callable[[str], None],
    missing: ToGather | None = None,
) -> None:
    """Gathers what is not there yet, and writes pages and exports.

    Ray is connected, where anything is missing. missing: as `to_gather` has found it.

    Raises:
        ConfigError: SAEs that have no text, or too many for the memory there is.
        SaerayError: harvesters die again and again, or nothing comes.
    """
    missing = missing or to_gather(sweep, wanted)
    for members in by_stream(missing.saes).values():
        gather(sweep, members, wanted, missing.digests, say)
    for name in wanted.saes:
        write(sweep, name, wanted.formats, say)
    features.write_list(sweep)
    if report.FILE in sweep.names():
        report.write_report([sweep], sweep)  # with links to them


def refuse_textless(saes: Sequence[SAE]) -> None:
    for s in saes:
        if is_synthetic(s.config.model_name):
            raise bad_value(
                "model_name",
                s.config.model_name,
                "has no text, so its SAEs' features have no contexts; how they match the known "
                "ones is in the results (docs/synthetic.md).",
            )


def already(sweep: Folder, name: str) -> str | None:
    """What the features that are there were made of."""
    about = feature_data.read_about(sweep / feature_data.PLACE / name) or {}
    return about.get("digest")


def digest_of(sweep: Folder, sae: SAE, wanted: Wanted) -> str:
    """Of all that an SAE's features depend on."""
    weights = (sweep / "trials" / sae.name / "final").read("sae_weights.safetensors")
    seen = hashlib.sha256(weights).hexdigest()
    config = sae.config.to_dict()
    return digest([VERSION, seen, config, wanted.tokens, wanted.top, BANDS, PER_BAND])


def gather(
    sweep: Folder,
    saes: Sequence[SAE],
    wanted: Wanted,
    digests: dict[str, str],
    say: Callable[[str], None],
) -> None:
    """One pass for SAEs of one stream."""
    from saeray.stream.feature_harvester import FeatureJob
    from saeray.stream.feature_harvester import Wanted as OneSAE
    from saeray.stream.feature_pass import FeaturePass

    configs = [s.config for s in saes]
    first = configs[0]
    root = sweep / feature_data.PLACE
    place = root / f".pass-{digest([digests[s.name] for s in saes])}"
    job = FeatureJob(
        {
            s.name: OneSAE(
                (sweep / "trials" / s.name / "final").uri,
                s.config.resolved_hook_point,
                s.config.hooks_read[-1],
                d_sae_of(sweep, s),
            )
            for s in saes
        },
        first.context_size,
        wanted.top,
        BANDS,
        PER_BAND,
        sweep.uri,
        place.uri,
    )
    harvesters = wanted.harvesters or first.resources.harvesters
    n = harvesters if isinstance(harvesters, int) else 1
    text = f"{len(saes)} SAEs on" if len(saes) > 1 else f"{saes[0].name} on"
    say(f"reading {wanted.tokens:,} tokens for {text} {first.model_name}")
    about = {s.name: about_of(sweep, s, digests[s.name], wanted) for s in saes}
    FeaturePass(first, hook_points_of(configs), job, place, n, say).run(wanted.tokens, about)
    place.delete()


def d_sae_of(sweep: Folder, sae: SAE) -> int:
    cfg = strict_json.loads((sweep / "trials" / sae.name / "final").read("cfg.json"))
    return int(cfg["d_sae"])


def about_of(sweep: Folder, sae: SAE, digest: str, wanted: Wanted) -> dict[str, Any]:
    """What about.json says, beside what only the pass knows."""
    c: LanguageModelSAERunnerConfig = sae.config
    return {
        "digest": digest,
        "sweep": sweep.name,
        "sae": sae.name,
        "architecture": c.architecture,
        "model_name": c.model_name,
        "hook_point": c.resolved_hook_point,
        "writes_to": c.hooks_read[-1],
        "dataset_path": c.dataset_path,
        "context_size": c.context_size,
        "prepend_bos": c.prepend_bos,
        "top": wanted.top,
        "bands": BANDS,
        "per_band": PER_BAND,
    }


def write(sweep: Folder, name: str, formats: Sequence[str], say: Callable[[str], None]) -> None:
    """An SAE's pages and exports."""
    folder = sweep / feature_data.PLACE / name
    for kind in formats:
        if kind == "pages":
            size, where = features.write_pages(folder), "index.html"
        else:
            size, where = features_export.write(folder, kind), kind
        say(f"{(folder / where).uri} ({size / 1e6:.1f} MB)")


def make_there(sweep: str, wanted: Wanted) -> list[str]:
    """`make` in a task on the head node; what it said."""
    from saeray.actors.head_folder import seen_from_here

    said: list[str] = []
    make(seen_from_here(sweep), wanted, said.append)
    return said
