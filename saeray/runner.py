"""The user's side in Python: `sweep(config)` and the guide's `language_model_sae_runner(cfg)`.

Both are thin layers over `tune.run(SAETrial, ...)`: they name the sweep, tell its roster which SAEs
to expect, and draw the live view while Tune runs.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeray.config import LanguageModelSAERunnerConfig, grid_axes, resolve
from saeray.errors import ConfigError, SaerayError, bad_value
from saeray.grid import SAE, expand
from saeray.messages import DONE, FAILED, SweepStatus
from saeray.storage import Folder

if TYPE_CHECKING:
    from saeray.sae.standard import StandardSAE


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
        return all(row["status"] != FAILED for row in self.rows)

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
            lines.append(
                f"LM tokens harvested: {status.harvested_tokens:,}; one SAE trained on "
                f"{longest:,} ({status.harvested_tokens / longest:.3f}x); all SAEs together on "
                f"{status.trained_tokens:,}. Evaluation: {human(status.evaluation_tokens)} tokens, "
                "held out."
            )
        lines += [f"! {warning}" for warning in status.warnings]
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
    if folder.names():
        raise bad_value("name", config.name, f"{folder.uri} is there already; choose another name.")
    started_ray = start_ray(address)
    try:
        return run(config, saes, folder, scheduler, live, ends_ray=started_ray)
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

    storage = config.storage_path
    if storage is not None and "://" not in storage:
        storage = str(Path(storage).expanduser().absolute())
    return config.replace(
        model_name=absolute(config.model_name),
        dataset_path=absolute(config.dataset_path),
        storage_path=storage,
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
    passed_on = {
        key: value
        for key, value in os.environ.items()
        if key.startswith(("WANDB_", "HF_", "RAY_TRAIN_"))
    }
    options: dict[str, Any] = {
        "namespace": "saeray",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": passed_on},
    }
    if address is None:
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
    config: LanguageModelSAERunnerConfig,
    saes: list[SAE],
    folder: Folder,
    scheduler: Any,
    live: bool,
    ends_ray: bool,
) -> SweepResult:
    """One sweep on the Ray instance this process is connected to."""
    import ray
    from ray import tune

    from saeray.cluster import waiting
    from saeray.cluster.roster import find_or_create
    from saeray.cluster.trial import INTERNAL, SAETrial
    from saeray.live import LiveView

    assert config.name is not None
    axes = grid_axes(config)
    roster = find_or_create(config.name, folder.uri)
    limit = config.wait_limit_s
    configs = {s.name: s.config.to_dict() for s in saes}
    waiting.get(roster.begin.remote(configs, provenance()), limit, "roster")
    space: dict[str, Any] = config.to_dict()
    for axis in axes:
        space[axis] = tune.grid_search(space[axis])
    space[INTERNAL] = {"sweep": config.name, "folder": folder.uri, "axes": axes}
    view = LiveView(lambda: waiting.get(roster.status.remote(), limit, "roster"), live)
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
                    name="tune",
                    storage_path=(folder / ".ray").uri,
                    config=space,
                    scheduler=scheduler,
                    verbose=0,
                    raise_on_failed_trial=False,
                    trial_name_creator=lambda trial: f"trial_{trial.trial_id}",
                    trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
                )
                view.wait_for_end(limit)
    finally:
        bad_input = view.status.error is not None
        waiting.get(roster.close.remote(wait=not (ends_ray and bad_input)), limit, "roster")
        ray.kill(roster)
    status = view.status
    if status.error is not None:
        raise (ConfigError if status.bad_input else SaerayError)(status.error)
    return SweepResult(config.name, folder, read_rows(folder), status)


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


def read_rows(folder: Folder) -> list[dict[str, Any]]:
    import io

    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(folder.read("results.parquet")))
    return table.to_pylist()
