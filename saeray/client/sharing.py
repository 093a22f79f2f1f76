"""`saeray push`, `pull` and `export`: SAEs for others, and from them.

A repository on the Hugging Face hub has a folder per SAE, as sae_lens loads them; what else a
sweep has (sweep.yaml, results, the picture) lies at its top, so `pull` gives the sweep back.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from saeray.client.result import SweepResult, load_sweep
from saeray.errors import ConfigError, bad_value, nearest
from saeray.files import hub_repo, model_card, strict_json
from saeray.files.picture import write_pareto
from saeray.files.results import results_table, write_results
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import DONE, STOPPED

OF_A_TRIAL = ("features.parquet", "metrics.jsonl")  # beside its final/
OF_A_SWEEP = ("README.md", "sweep.yaml", "results.csv", "results.parquet", "pareto.png")


def chosen(where: Any) -> tuple[SweepResult, list[str]]:
    """A sweep and the SAEs of it that SWEEP[/SAE] names: those that are trained.

    Raises:
        ConfigError: no sweep is there, or no such SAE, or none that is trained.
    """
    if isinstance(where, SweepResult):
        sweep, name = where, None
    else:
        place = Folder.at(where, "SWEEP")
        sweep_of, name = place, None
        above = place.parent
        if "sweep.yaml" not in place.names() and above is not None:
            if place.name == "final" and above.parent is not None:  # …/trials/SAE/final
                place, above = above, above.parent
            if above.name == "trials" and above.parent is not None:
                above = above.parent
            if "sweep.yaml" in above.names():
                sweep_of, name = above, place.name
        sweep = load_sweep(sweep_of)
    trained = [row["trial"] for row in sweep.rows if row["status"] in (DONE, STOPPED)]
    if name is None:
        if not trained:
            raise ConfigError(f"{sweep.folder.uri}: no SAE of it is trained yet.")
        return sweep, trained
    if name not in trained:
        known = [row["trial"] for row in sweep.rows]
        said = "it is not trained yet" if name in known else nearest(name, known)
        raise bad_value("SAE", name, f"in {sweep.folder.uri}: {said}")
    return sweep, [name]


# --- export -----------------------------------------------------------------------------------


def export(sweep: Any, format: str, output: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Writes SAEs in another package's format; the folder of each, by its name.

    Args:
        sweep: a sweep's folder or result, or `SWEEP/SAE` for one of its SAEs.
        format: sae_lens, dictionary_learning or saebench.
        output: a folder for the SAEs' own; default: `export/FORMAT` in the sweep's.

    Raises:
        ConfigError: no such sweep, SAE or format, or an SAE that the format can't hold. Nothing is
            written then.
    """
    from saeray.files.export import FORMATS, exported

    if format not in FORMATS:
        raise bad_value("format", format, nearest(format, FORMATS))
    result, names = chosen(sweep)
    target = result.folder / "export" / format if output is None else Folder.at(output, "output")
    for writes in (False, True):  # that all of them can be held is known before any is written
        for name in names:
            try:
                files = exported(result.load(name), format)
            except ConfigError as error:
                raise ConfigError(f"{name}: {format} can't hold it: {error}") from None
            for file, data in files.items() if writes else ():
                (target / name).write(file, data)
    return {name: (target / name).uri for name in names}


# --- push -------------------------------------------------------------------------------------


def push(sweep: Any, repo: str, *, private: bool | None = None, license: str | None = None) -> str:
    """Publishes SAEs of a sweep as a repository on the Hugging Face hub; its address.

    What was pushed there before stays, so SAEs may come one by one. Token and address are
    huggingface_hub's: HF_TOKEN or `hf auth login`, HF_ENDPOINT.

    Args:
        sweep: a sweep's folder or result, or `SWEEP/SAE` for one of its SAEs.
        repo: `user/repo`; made where there is none.
        private: True: refused where it is public already. None: as the account says.
        license: for the model card; None leaves the field as it is, or out.

    Raises:
        ConfigError: no such sweep or SAE, no right to the repository, or another SAE of one of
            these names in it. SaerayError: the hub does not answer.
    """
    name = hub_repo.parsed(repo)
    if name.inside or name.revision:
        raise bad_value("REPO", repo, "user/repo is wanted.")
    result, names = chosen(sweep)
    configs = SweepFolder(result.folder, result.name).read_configs()
    rows = [row for row in result.rows if row["trial"] in names]
    rows = [row | {"path": row["trial"]} for row in rows]  # in the repository
    mine = yaml.safe_load(result.folder.read("sweep.yaml"))
    mine["saes"] = {
        n: model_card.published_config(c) for n, c in mine["saes"].items() if n in names
    }
    mine.pop("resources", None)
    there = hub_repo.there(repo, OF_A_SWEEP)
    mine, rows, configs = with_those_there(repo, there, mine, rows, configs)
    readme = there.get("README.md", b"").decode()
    card = model_card.Card(repo, mine["name"], rows, configs, license, readme)

    def parts() -> Iterator[Mapping[str, bytes | Path]]:
        for sae in names:
            yield dict(files_of_sae(result, sae))
        with tempfile.TemporaryDirectory() as place:
            folder = Folder.at(place)
            write_results(folder, rows)
            write_pareto(folder, rows, mine["name"])
            folder.write("sweep.yaml", yaml.safe_dump(mine, sort_keys=False).encode())
            folder.write("README.md", model_card.written(card).encode())
            yield {n: folder.read(n) for n in OF_A_SWEEP}

    said = f"{len(names)} SAEs of {result.name}" if len(names) > 1 else names[0]
    return hub_repo.published(repo, parts(), said, private)


def with_those_there(
    repo: str,
    there: Mapping[str, bytes],
    mine: dict[str, Any],
    rows: list[dict[str, Any]],
    configs: dict[str, LanguageModelSAERunnerConfig],
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, LanguageModelSAERunnerConfig]]:
    """sweep.yaml, rows and configs, with those of SAEs that were pushed before.

    Raises:
        ConfigError: another SAE of the same name is among them.
    """
    if not {"sweep.yaml", "results.parquet"} <= {*there}:
        return mine, rows, configs
    before = yaml.safe_load(there["sweep.yaml"])["saes"]
    for name, config in mine["saes"].items():
        other = before.get(name, config)
        differing = [k for k in config if other.get(k) != config[k] and k not in MAY_DIFFER]
        if differing:
            raise ConfigError(
                f"{repo}: has another SAE called {name} ({differing[0]} = "
                f"{other.get(differing[0])!r}, here {config[differing[0]]!r}); another repository "
                "is wanted."
            )
    kept = {name: config for name, config in before.items() if name not in mine["saes"]}
    old = results_table(there["results.parquet"]).to_pylist()
    rows = [row for row in old if row["trial"] in kept] + rows
    read = {n: LanguageModelSAERunnerConfig.from_dict(c, source=repo) for n, c in kept.items()}
    return mine | {"saes": kept | mine["saes"]}, rows, configs | read


MAY_DIFFER = frozenset(model_card.OF_THE_MACHINE)


def files_of_sae(result: SweepResult, name: str) -> Iterator[tuple[str, bytes | Path]]:
    """The files of a trained SAE by their paths in a repository."""
    final = result.final(name)
    for file in hub_repo.SAE_FILES:
        if file == "cfg.json":
            cfg = strict_json.loads(final.read(file))
            given = cfg["metadata"].get("training_config")
            if given is not None:
                cfg["metadata"]["training_config"] = model_card.published_config(given)
            text = strict_json.dumps(cfg, indent=2, sort_keys=True) + "\n"
            yield f"{name}/{file}", text.encode()
        elif file in final.names():
            yield f"{name}/{file}", content(final, file)
    trial = result.folder / "trials" / name
    for file in OF_A_TRIAL:
        if file in trial.names():
            yield f"{name}/{file}", content(trial, file)


def content(folder: Folder, file: str) -> bytes | Path:
    """A local file as it is, however large; another one's bytes."""
    return Path(folder.path) / file if folder.is_local else folder.read(file)


# --- pull -------------------------------------------------------------------------------------


def pull(repo: str, directory: str | os.PathLike[str] | None = None) -> str:
    """Brings SAEs from the Hugging Face hub home; the folder they are in.

    What saeray has pushed is a sweep again (`saeray.load_sweep`, `saeray best`); of other
    repositories it is the folders of SAEs as they lie there.

    Args:
        repo: `user/repo`, `user/repo@revision`, or `user/repo/SAE` for one of them.
        directory: a folder that is not there yet, or empty; default: the repository's name.

    Raises:
        ConfigError: no such repository, no SAE in it, or a folder that is in use.
    """
    name = hub_repo.parsed(repo)
    target = Path(directory or name.repo.partition("/")[2]).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise bad_value("DIR", str(target), "is there and not empty; name another folder.")
    files = hub_repo.files_of(name)
    saes = [f.rpartition("/")[0] for f in files if f.rpartition("/")[2] == "cfg.json"]
    if name.inside:
        saes = [s for s in saes if s in (name.inside, f"{name.inside}/final")]
    if not saes:
        raise ConfigError(f"{repo}: no SAE is there; a folder with cfg.json is one.")
    is_sweep = {"sweep.yaml", "results.parquet"} <= {*files}
    wanted = {}
    for sae in saes:
        prefix = f"{sae}/" if sae else ""
        home = f"trials/{sae}/" if is_sweep else prefix
        for file in (*hub_repo.SAE_FILES, *OF_A_TRIAL):
            if prefix + file in files:
                inner = "final/" if is_sweep and file in hub_repo.SAE_FILES else ""
                wanted[prefix + file] = f"{home}{inner}{file}"
    wanted |= {file: file for file in OF_A_SWEEP if is_sweep and file in files}
    if any(".." in Path(place).parts or Path(place).is_absolute() for place in wanted.values()):
        raise ConfigError(f"{repo}: has a path that leads out of the folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
        place = Path(beside) / uuid.uuid4().hex[:8]
        hub_repo.brought(name, wanted, place)
        if is_sweep:
            at_home(Folder.at(place), target.name, saes)
        if target.exists():
            target.rmdir()
        os.rename(place, target)
    return str(target)


def at_home(folder: Folder, name: str, saes: list[str]) -> None:
    """sweep.yaml and results of these SAEs alone, with the paths that they have in a sweep."""
    data = yaml.safe_load(folder.read("sweep.yaml"))
    data["saes"] = {name: config for name, config in data["saes"].items() if name in saes}
    folder.write("sweep.yaml", yaml.safe_dump(data | {"name": name}, sort_keys=False).encode())
    table = results_table(folder.read("results.parquet"))
    rows = [row for row in table.to_pylist() if row["trial"] in saes]
    write_results(
        folder,
        [row | {"path": f"trials/{row['trial']}/final"} for row in rows],
    )
