"""What `--resume` may change of a sweep: where and how it runs, and how long its SAEs train.

An SAE that trains on to more tokens is, in the end, the SAE of a sweep that was asked for as many
in the first place, bit for bit. So what depends on where the training ends is refused by its name,
and so is an SAE of which no checkpoint is left that both trainings have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import yaml

from saeray.errors import ConfigError, bad_value, nearest
from saeray.files.metrics_log import cut
from saeray.files.storage import Folder
from saeray.files.sweep_folder import Outcome, SweepFolder
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import DONE, INTERRUPTED, WAITING
from saeray.spec.order import StreamOrder
from saeray.spec.resources import Resources

WHERE_IT_RUNS = ("resources", "wait_limit_s", "reader_lag_s", "checkpoint_every_s")
TOKENS = "training_tokens"
Changes = Mapping[str, Any]


def changes_from(overrides: Sequence[str]) -> dict[str, Any]:
    """Of `--set KEY=VALUE` beside `--resume`."""
    found: dict[str, Any] = {}
    for override in overrides:
        key, given, text = override.partition("=")
        target, _, inner = key.partition(".")
        if not given:
            raise ConfigError(f"--set {override!r}: key=value is wanted.")
        value = yaml.safe_load(text)
        if inner:
            found.setdefault(target, {})[inner] = value
        else:
            found[target] = value
    return found


def refuse_running(place: Folder) -> None:
    """Ray is connected. Raises ConfigError: the sweep is running there, as it was begun."""
    import ray

    from saeray.actors.names import drivers_name, roster_name
    from saeray.actors.nodes import namespace

    roster = roster_name(place.name, place.uri)
    for name in (roster, drivers_name(roster)):
        try:
            ray.get_actor(name, namespace())
        except ValueError:
            continue
        raise ConfigError(
            f"{place.name}: runs, or is just ending; `saeray stop {place.name}` first, and then "
            "--resume with changes."
        )


def checked(place: Folder, changes: Changes) -> Callable[[], None]:
    """What writes the changes into a sweep's folder, once nobody is at work on it.

    changes: fields with their new values; of `resources` only what changes.

    Raises:
        ConfigError: a field that can't be changed, a value that is none, or an SAE that can't go on
            to so many tokens.
    """
    if not changes:
        return lambda: None
    may = (*WHERE_IT_RUNS, TOKENS)
    for name in changes:
        if name not in may:
            known = [f.name for f in fields(LanguageModelSAERunnerConfig)]
            why = (
                f"can't be changed by --resume, which ends as an uninterrupted sweep would; "
                f"{', '.join(may)} can."
                if name in known
                else f"unknown; {nearest(name, may)}"
            )
            raise ConfigError(f"{name}: {why}")
    files = SweepFolder(place, place.name)
    data, configs = files.read_sweep_yaml(), files.read_configs()
    asked = files.read_asked()
    tokens = changes.get(TOKENS)
    new = {name: with_changes(config, changes) for name, config in configs.items()}
    starts = {} if tokens is None else starts_of(files, configs, new)
    for name, value in changes.items():
        asked[name] = asked.get(name, {}) | dict(value) if name == "resources" else value
    if tokens is not None and asked:
        if asked.get("stream_tokens") is not None:
            asked["stream_tokens"] = max(asked["stream_tokens"], tokens)
        # Shares of the steps that there were, by the recipe: they stay what they are.
        for name in ("lr_warm_up_steps", "l1_warm_up_steps"):
            values = {getattr(config, name) for config in new.values()}
            if len(values) == 1 and name not in asked:
                asked[name] = values.pop()

    def write() -> None:
        if tokens is not None:
            go_on(files, new, starts)
        files.write_sweep_yaml(new, data.get("versions") or {}, data.get("resources") or {}, asked)

    return write


def with_changes(
    config: LanguageModelSAERunnerConfig, changes: Changes
) -> LanguageModelSAERunnerConfig:
    values = dict(changes)
    if "resources" in values:
        if not isinstance(values["resources"], Mapping):
            raise bad_value("resources", values["resources"], "{harvesters: 2, …} is wanted.")
        now = {f.name: getattr(config.resources, f.name) for f in fields(Resources)}
        values["resources"] = now | dict(values["resources"])
    tokens = values.get(TOKENS)
    if tokens is not None:
        if isinstance(tokens, float) and tokens.is_integer():
            tokens = values[TOKENS] = int(tokens)  # 4e6
        if not isinstance(tokens, int) or isinstance(tokens, bool):
            raise bad_value(TOKENS, tokens, "one whole number is wanted.")
        if tokens < config.training_tokens:
            raise bad_value(
                TOKENS, tokens, f"the sweep has {config.training_tokens:,}; it can only be more."
            )
        values["stream_tokens"] = max(config.stream_tokens or 0, tokens)
    return config.replace(**values)


def starts_of(
    files: SweepFolder,
    before: Mapping[str, LanguageModelSAERunnerConfig],
    new: Mapping[str, LanguageModelSAERunnerConfig],
) -> dict[str, int]:
    """The SAEs that train on to more tokens, and the step that each of them goes on from.

    Raises:
        ConfigError: of one of them, what would not be as if it had been asked for at the start.
    """
    if len({c.training_tokens for c in before.values()}) > 1:
        raise ConfigError(f"{TOKENS}: is an axis of the sweep, and stands in its SAEs' names.")
    longer = {n: c for n, c in before.items() if new[n].training_tokens > c.training_tokens}
    known = files.known(list(before))
    starts: dict[str, int] = {}  # in steps
    for name, config in longer.items():
        if known[name].state not in (DONE, WAITING):
            continue  # failed, or stopped by a scheduler: it stays as it is
        refuse_what_depends_on_the_end(config)
        common = common_steps(config)
        at = (files.folder / "trials" / name / "checkpoints").numbers()
        steps = [t // config.train_batch_size for t in at]
        usable = [step for step in steps if step <= common]
        if known[name].state == DONE and not usable:
            raise ConfigError(
                f"{TOKENS}: {name} has ended, and no checkpoint of it is left to go on from "
                "(n_checkpoints keeps some); a new sweep trains it to more tokens."
            )
        if len(usable) < len(steps) and known[name].state == WAITING:
            raise ConfigError(
                f"{TOKENS}: {name} is in the last window of its text's rows, which are served in "
                f"another order when there are more (its checkpoint is at step {max(steps):,}, "
                f"the order is the same up to {common:,}); let it end, or begin a new sweep."
            )
        starts[name] = max(usable, default=0)
    return starts


def go_on(
    files: SweepFolder,
    new: Mapping[str, LanguageModelSAERunnerConfig],
    starts: Mapping[str, int],
) -> None:
    """Takes away what these SAEs have of later steps than that they go on from."""
    for name, start in starts.items():
        trial, batch = files.folder / "trials" / name, new[name].train_batch_size
        for tokens in (trial / "checkpoints").numbers():
            if tokens > start * batch:
                (trial / "checkpoints" / str(tokens)).delete()
        cut(trial, start)
    rows, now = {row["trial"] for row in files.read_rows()}, files.known(list(new))
    outcomes = []
    for name in new:
        state, path, error = now[name][:3]
        if name in starts:
            state, path = INTERRUPTED, None
        if name in rows:
            state = INTERRUPTED if state == WAITING else state
            outcomes.append(Outcome(name, new[name], state, path, now[name].metrics, error))
    if outcomes:
        files.write_results(outcomes)


def refuse_what_depends_on_the_end(config: LanguageModelSAERunnerConfig) -> None:
    """Raises ConfigError, by the name of what is another one in a longer training from early on."""
    constant = config.lr_scheduler_name in ("constant", "constantwithwarmup")
    steered = config.target_l0 is not None and config.k is None
    depends = {
        "lr_scheduler_name": None if constant else config.lr_scheduler_name,
        "lr_decay_steps": config.lr_decay_steps or None,
        "target_l0": config.target_l0 if steered else None,
        "architecture": "p_anneal" if config.architecture == "p_anneal" else None,
        "feature_sampling_method": config.feature_sampling_method
        if config.feature_sampling_method not in (None, "none")
        else None,
    }
    for name, value in depends.items():
        if value is not None:
            raise ConfigError(
                f"{TOKENS}: can't be raised where {name} is {value!r}, since what that does to an "
                "SAE depends from early on on where its training ends; a new sweep can."
            )


def common_steps(config: LanguageModelSAERunnerConfig) -> int:
    """The steps whose rows are the same in a longer stream: those before the last window."""
    assert config.stream_tokens is not None and config.data_seed is not None
    order = StreamOrder.of(
        config.stream_tokens, config.block_rows, config.n_batches_in_buffer, config.data_seed
    )
    return order.window_start(order.n_windows - 1) // config.train_batch_size
