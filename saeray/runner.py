"""The user's side in Python: `sweep(config)` and the guide's `language_model_sae_runner(cfg)`.

Both are thin layers over `tune.run(SAETrial, ...)`: they name the sweep, tell its roster which SAEs
to expect, and draw the live view while Tune runs.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeray.config import LanguageModelSAERunnerConfig, grid_axes, resolve
from saeray.errors import ConfigError, Late, SaerayError, bad_value
from saeray.grid import SAE, expand
from saeray.messages import DONE, ENDS, FAILED, INTERRUPTED, SAERow, SweepStatus
from saeray.storage import Folder
from saeray.sweep_folder import SweepFolder

if TYPE_CHECKING:
    from saeray.sae.standard import StandardSAE


TRIAL_RESTARTS = 5  # of an SAE's trial by Tune; the SAE itself is not disturbed


@dataclass
class SweepResult:
    """What a sweep has left behind."""

    name: str
    folder: Folder
    rows: list[dict[str, Any]]  # results.csv, row by row
    status: SweepStatus

    @property
    def ok(self) -> bool:
        """Whether every SAE finished."""
        return not any(row["status"] in (FAILED, INTERRUPTED) for row in self.rows)

    def summary(self) -> str:
        """A table of the SAEs, the account of tokens, and where everything is."""
        from saeray.live import human

        lines = [f"{'SAE':<44} {'status':<8} {'L0':>8} {'expl.var':>9} {'CE score':>9} {'dead':>6}"]
        for row in self.rows:
            figures = [
                "–" if row[key] is None else format(row[key], form)
                for key, form in (
                    ("l0", ".1f"),
                    ("explained_variance", ".3f"),
                    ("ce_loss_score", ".3f"),
                    ("dead_features", ".0f"),
                )
            ]
            widths = zip(figures, (8, 9, 9, 6), strict=True)
            lines.append(
                f"{row['trial']:<44} {row['status']:<8} " + " ".join(f"{f:>{w}}" for f, w in widths)
            )
            if row["error"]:
                lines.append(f"    {row['error']}")
        status = self.status
        longest = max((r.n_training_tokens for r in status.rows), default=0)
        if longest:
            cached = f", {status.cached_tokens:,} read from cache" if status.cached_tokens else ""
            lines.append(
                f"LM tokens harvested: {status.harvested_tokens:,}{cached}; one SAE trained on "
                f"{longest:,} ({status.harvested_tokens / longest:.3f}x); all SAEs together on "
                f"{status.trained_tokens:,}. Evaluation: {human(status.evaluation_tokens)} tokens, "
                "held out."
            )
        lines += [f"! {warning}" for warning in status.warnings]
        if any(row["status"] == INTERRUPTED for row in self.rows):
            lines.append(f"interrupted SAEs go on with: saeray sweep --resume {self.folder.uri}")
        lines.append(f"results: {self.folder.uri}")
        return "\n".join(lines)

    def load(self, trial: str) -> StandardSAE:
        """The trained SAE of a row's `trial`."""
        from saeray.checkpoint import load_sae

        return load_sae(self.folder / "trials" / trial / "final")


def sweep(
    config: LanguageModelSAERunnerConfig | Mapping[str, Any],
    *,
    name: str | None = None,
    storage_path: str | os.PathLike[str] | None = None,
    address: str | None = None,
    scheduler: Any = None,
    live: bool = True,
) -> SweepResult:
    """Trains the grid that `config` spans (a list in a field is an axis), one LM pass for all.

    Args:
        config: the guide's fields, as an object or flat data.
        name: of the sweep; its results stand in `<storage_path>/<name>`. Default: derived from the
            model, the hook point and the time.
        storage_path: local path or URI; default: the config's.
        address: of a Ray cluster; default: RAY_ADDRESS, or this machine.
        scheduler: a Ray Tune scheduler; default FIFO. Use `n_training_tokens` as time_attr.
        live: draw a table while it runs (plain lines when not a terminal).

    Raises:
        ConfigError: bad input, before anything is spent.
    """
    if not isinstance(config, LanguageModelSAERunnerConfig):
        config = LanguageModelSAERunnerConfig.from_dict(config)
    config = config.replace(
        name=name or config.name or default_name(config),
        storage_path=str(storage_path or config.storage_path or config.checkpoint_path),
    )
    config = resolve(with_absolute_paths(config))
    assert config.name is not None and config.storage_path is not None
    saes = expand(config)
    folder = Folder.at(config.storage_path) / config.name
    if config.activation_cache is not None:
        Folder.at(config.activation_cache, "activation_cache")
    if folder.names():
        raise bad_value(
            "name",
            config.name,
            f"{folder.uri} is there already; choose another name, or go on with it by --resume.",
        )
    return run_on_ray(saes, folder, config.name, address, scheduler, live)


def resume(
    folder: str | os.PathLike[str],
    *,
    address: str | None = None,
    scheduler: Any = None,
    live: bool = True,
) -> SweepResult:
    """Goes on with a sweep that was interrupted, to the files an uninterrupted one gives.

    SAEs that are done, were stopped by a scheduler or failed by themselves stay as they are; the
    others go on from their newest checkpoint. On a cluster where the sweep still runs, this joins
    it.

    Args:
        folder: of the sweep: its path or URI.

    Raises:
        ConfigError: no sweep is there, or its sweep.yaml is damaged.
    """
    place = Folder.at(folder)
    name = place.name
    files = SweepFolder(place, name)
    saes = [SAE(n, config) for n, config in files.read_configs().items()]
    known = files.known([s.name for s in saes])
    if all(k.state in ENDS for k in known.values()):
        rows = [
            SAERow(s.name, k.state, k.step, s.config.steps, k.n_training_tokens, k.metrics, k.error)
            for s, k in ((s, known[s.name]) for s in saes)
        ]
        return SweepResult(name, place, files.read_rows(), SweepStatus(rows, "done already"))
    return run_on_ray(saes, place, name, address, scheduler, live, resuming=True)


def run_on_ray(
    saes: list[SAE],
    folder: Folder,
    name: str,
    address: str | None,
    scheduler: Any,
    live: bool,
    resuming: bool = False,
) -> SweepResult:
    started_ray = start_ray(address)
    try:
        return run(saes, folder, name, scheduler, live, started_ray, resuming)
    finally:
        if started_ray:
            import ray

            ray.shutdown()


def language_model_sae_runner(
    cfg: LanguageModelSAERunnerConfig,
) -> StandardSAE | list[StandardSAE]:
    """The guide's runner: trains and returns the SAE (of a grid, all of them in grid order).

    Raises:
        ConfigError: bad input. SaerayError: training failed.
    """
    result = sweep(cfg)
    failed = [row for row in result.rows if row["status"] != DONE]
    if failed:
        raise SaerayError("; ".join(str(row["error"]) for row in failed))
    trained = [result.load(row["trial"]) for row in result.rows]
    return trained if grid_axes(cfg) else trained[0]


def default_name(config: LanguageModelSAERunnerConfig) -> str:
    """<model>-<hook point>-<time>: readable, and new each time."""
    model = Path(str(config.model_name)).name
    hook = str(config.hook_point).replace("blocks.", "").replace("{layer}", "x")
    return f"{model}-{hook}-{time.strftime('%Y%m%d-%H%M%S')}"


def with_absolute_paths(config: LanguageModelSAERunnerConfig) -> LanguageModelSAERunnerConfig:
    """Actors run in other working directories: local paths are made absolute here."""

    def absolute(path: Any) -> Any:
        if isinstance(path, str) and "://" not in path and Path(path).expanduser().exists():
            return str(Path(path).expanduser().absolute())
        return path

    def to_be_made(path: str | None) -> str | None:
        if path is not None and "://" not in path:
            return str(Path(path).expanduser().absolute())
        return path

    return config.replace(
        model_name=absolute(config.model_name),
        dataset_path=absolute(config.dataset_path),
        storage_path=to_be_made(config.storage_path),
        activation_cache=to_be_made(config.activation_cache),
    )


def start_ray(address: str | None) -> bool:
    """Connects to a cluster or starts Ray on this machine; whether it did either."""
    # Quiet, and without the two processes Train would start to watch for preemption.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own tables; the live view is ours
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the sweep at once
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # we write the metrics
    import ray

    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    # Not the user's keys: Ray writes a runtime_env into its logs (see `launch.passed_on`).
    settings = {key: value for key, value in os.environ.items() if key.startswith("RAY_TRAIN_")}
    options: dict[str, Any] = {
        "namespace": "saeray",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": settings},
    }
    if address is None:
        # The history of every call, for a dashboard: there is none, and it takes 8 KB a block.
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
        ray.init(include_dashboard=False, **options)
    else:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise bad_value(
                "address",
                address,
                f"no Ray cluster answers there ({error}). Where the cluster uses token "
                "authentication, set RAY_AUTH_MODE=token and bring its ~/.ray/auth_token.",
            ) from None
    return True


def run(
    saes: list[SAE],
    folder: Folder,
    name: str,
    scheduler: Any,
    live: bool,
    ends_ray: bool,
    resuming: bool,
) -> SweepResult:
    """One sweep on the Ray instance this process is connected to."""
    import ray
    from ray import tune

    from saeray.cluster import waiting
    from saeray.cluster.trial import INTERNAL, SAETrial
    from saeray.live import LiveView

    keep_keys_out_of_logs()
    limit = saes[0].config.wait_limit_s
    roster = begun(saes, folder, name, limit, resuming)
    view = LiveView(lambda: waiting.ask(roster.status.remote, limit, "roster"), live)
    view.update()
    ended = {row.name for row in view.status.rows if row.state in ENDS}
    points = [{"name": s.name, "config": s.config.to_dict()} for s in saes if s.name not in ended]
    known = {"sweep": name, "folder": folder.uri, "sae": tune.grid_search(points)}
    try:
        with view:
            # Trials only wait for reports, and on few cores their start takes a while from the
            # others: after what may yet turn out to be bad input, before the training.
            view.wait_for_stream()
            # A failed SAE is in the results with its reason; Tune would print its traceback too.
            logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
            if view.status.error is None:
                tune.run(
                    SAETrial,
                    name=f"tune-{uuid.uuid4().hex[:6]}",
                    storage_path=(folder / ".ray").uri,
                    config={INTERNAL: known},
                    scheduler=scheduler,
                    verbose=0,
                    max_failures=TRIAL_RESTARTS,
                    raise_on_failed_trial=False,
                    trial_name_creator=lambda trial: f"trial_{trial.trial_id}",
                    trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
                )
                view.wait_for_end(limit)
    finally:
        bad_input = view.status.error is not None
        waiting.ask(lambda: roster.close.remote(wait=not (ends_ray and bad_input)), limit, "roster")
        ray.kill(roster)
    status = view.status
    if status.error is not None:
        raise (ConfigError if status.bad_input else SaerayError)(status.error)
    return SweepResult(name, folder, SweepFolder(folder, name).read_rows(), status)


def keep_keys_out_of_logs() -> None:
    """Keeps Tune from handing on AWS keys in a runtime_env, which Ray writes into its logs.

    On this machine trials inherit them; a cluster's nodes need their own anyway.
    """
    from ray.tune.execution import class_cache

    handed_on: set[str] = getattr(class_cache, "ENV_VARS_TO_PROPAGATE", set())
    handed_on -= {name for name in handed_on if name.startswith("AWS_")}


def begun(saes: list[SAE], folder: Folder, name: str, limit_s: float, resuming: bool) -> Any:
    """The sweep's roster, told what to train; one that is just closing is waited for."""
    from ray.exceptions import RayActorError

    from saeray.cluster import waiting
    from saeray.cluster.roster import find_or_create

    configs = {s.name: s.config.to_dict() for s in saes}
    versions = provenance()
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        roster = find_or_create(name, folder.uri)
        try:
            if waiting.ask(
                lambda r=roster: r.begin.remote(configs, versions, resuming),  # type: ignore[misc]
                limit_s,
                "roster",
            ):
                return roster
        except RayActorError:
            pass  # it has just gone
        time.sleep(0.5)
    raise Late(f"the roster of an earlier session of {name} did not end within {limit_s:g} s.")


def provenance() -> dict[str, str | None]:
    """What the sweep was run with, for sweep.yaml."""
    from importlib.metadata import version

    def commit() -> str | None:
        here = Path(__file__).resolve().parent
        try:
            done = subprocess.run(
                ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    packages = ("saeray", "ray", "torch", "transformer_lens", "transformers", "datasets")
    return {**{name: version(name) for name in packages}, "git_commit": commit()}
