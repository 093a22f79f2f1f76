"""SAETrial: what Ray Tune sees of an SAE. Thin: it waits for reports and imports no torch.

    tune.run(
        saeray.SAETrial,
        config={..., "l1_coefficient": tune.grid_search([...]), "lr": tune.grid_search([...])},
    )

The trials of one experiment meet at its roster, which trains them in packs. A trial's Tune
checkpoint, taken at its first result and at its last, is a pointer, a small JSON with the folder of
its SAE; the SAE's real checkpoints lie there, so schedulers may pause and restore trials without
copying weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayError
from ray.tune.result import SHOULD_CHECKPOINT

from saeray.actors import waiting
from saeray.actors.make import end_at_sigterm
from saeray.actors.nodes import HEAD_SHARE, has_head
from saeray.actors.waiting import NotYet
from saeray.cluster.roster import find_or_create
from saeray.errors import ConfigError, SAEFailed, SaerayError, bad_value
from saeray.files import strict_json
from saeray.spec.config import LanguageModelSAERunnerConfig, grid_axes, resolve
from saeray.spec.grid import derived_name
from saeray.spec.messages import ENDS, FAILED, INTERRUPTED
from saeray.spec.metric_names import with_aliases
from saeray.spec.room import HEAD
from saeray.spec.scheduler import EVALUATED, NO_TAKEOVER

INTERNAL = "_saeray"  # key in a trial's config for a sweep of ours: its SAE and its folder
POINTER = "sae.json"


class SAETrial(tune.Trainable):
    """One SAE as a Tune trial. Its config is the flat fields of `LanguageModelSAERunnerConfig`.

    Results have every metric by its wandb key, held-out ones as of the newest evaluation (the first
    result has one, too), and `n_training_tokens` and `step` to be used as a scheduler's
    `time_attr`; `path`, the folder that has the SAE once the trial has ended, however it did; and
    `done` once the SAE is trained and evaluated.
    """

    sweep = ""  # its name, once that is known

    def __repr__(self) -> str:
        """What Ray's dashboard calls it: by the sweep, as it may be one SAE's after another."""
        return f"{self.sweep}: trial"

    def setup(self, config: dict[str, Any]) -> None:
        """Enlists at the experiment's roster.

        Raises:
            ConfigError: the config is not right.
        """
        end_at_sigterm()
        known = config.get(INTERNAL)
        if known is not None:
            sae = strict_json.loads(known["sae"])
            self.sae = LanguageModelSAERunnerConfig.from_dict(sae["config"])
            self.name, sweep, folder = sae["name"], known["sweep"], known["folder"]
        else:
            self.sae = resolve(one_sae(LanguageModelSAERunnerConfig.from_dict(config)))
            self.name = derived_name(self.sae)
            sweep, folder = self.own_folder()
        # Bare. In a sweep of ours the results say it; Tune would start a failed trial again.
        self.raises = known is None
        self.decides = known is None or known["decides"]  # a scheduler or searcher, on the results
        self.number = 0
        self.state = ""
        self.folder = self.path = None  # of its newest checkpoint, and where it is when trained
        self.enlist(sweep, folder)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Its process goes on as another trial's, where Tune reuses them (`reuse_actors`)."""
        self.setup(new_config)
        return True

    def own_folder(self) -> tuple[str, str]:
        """A bare tune.run: the sweep is the Tune experiment, unless the config names another."""
        storage = self._storage
        assert storage is not None
        sweep = self.sae.name or storage.experiment_dir_name
        root = self.sae.storage_path
        if root is None:
            kind = storage.storage_filesystem.type_name
            path = storage.storage_fs_path
            root = path if kind == "local" else f"{kind}://{path}"
        return sweep, f"{root}/{sweep}"

    def enlist(self, sweep: str, folder: str) -> None:
        """At the roster that is there, or the first of a new session.

        One that only trials want closes when none has come for a while, perhaps just now.
        """

        self.sweep = sweep

        def enlist(roster: Any) -> Any:
            return roster.enlist.remote(self.name, self.sae.to_dict())

        def roster() -> Any:
            return find_or_create(sweep, folder)

        limit, who = self.sae.wait_limit_s, f"the roster of {sweep}"
        if self.raises:
            self.roster, _ = waiting.one_that_takes(enlist, roster, limit, who)
        else:  # a sweep of ours ends its roster when it has no more use for trials
            self.roster = roster()
            waiting.ask(lambda: enlist(self.roster), limit, who)

    def step(self) -> dict[str, Any]:
        """Waits for the next report of the SAE.

        Raises:
            SAEFailed: the SAE can't be trained on; says at which step and why.
        """
        result = NotYet("")
        while isinstance(result, NotYet):  # however long its training takes
            result = waiting.ask(
                lambda: self.roster.next_result.remote(
                    self.name, self.number, self.decides, self.raises
                ),
                self.sae.wait_limit_s,
                "roster",
            )
        first = self.number == 0
        self.number, self.state = result.number, result.state
        self.folder, self.path = result.checkpoint, result.path
        if result.state in (FAILED, INTERRUPTED) and self.raises:
            raise SAEFailed(result.error)
        # Tune ends an experiment whose results lack what it decides on: one that failed before its
        # first evaluation, or a hook point that has no CE loss score.
        lacking = dict.fromkeys(EVALUATED, math.nan) if self.decides else {}
        figures = with_aliases(lacking | result.metrics)
        return {
            **figures,
            "n_training_tokens": result.n_training_tokens,
            "step": result.step,
            "path": result.path,
            "done": result.state in ENDS,
            # However Tune ends it, what it has of the trial leads to the SAE (`saeray.load_sae`).
            SHOULD_CHECKPOINT: self.raises and (first or result.state in ENDS),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        pointer = {
            "name": self.name,
            "folder": self.folder,
            "path": self.path,
            "number": self.number,
        }
        (Path(checkpoint_dir) / POINTER).write_text(strict_json.dumps(pointer))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to copy: the roster goes on from the SAE's own newest checkpoint.

        Raises:
            ConfigError: it is another SAE's.
        """
        pointer = strict_json.loads((Path(checkpoint) / POINTER).read_text())
        if pointer["name"] != self.name:
            raise ConfigError(f"{self.name} can't go on from {pointer['name']}: {NO_TAKEOVER}")
        self.folder, self.number = pointer["folder"], pointer["number"]
        self.path = pointer.get("path")

    def cleanup(self) -> None:
        """Tune is done with this trial; an SAE that is still training leaves its pack.

        A bare one waits for that: what its last result calls `path` is there when Tune has ended.
        A sweep of ours waits for all its SAEs itself. Where nothing decides on results, Tune is
        done with a process, not with its trial, which may have another by now (`reset_config`).
        """
        if not (self.raises or self.decides):
            return
        try:
            waiting.ask(lambda: self.roster.withdraw.remote(self.name), 10.0, "roster")
            if self.raises:
                waiting.poll(
                    lambda: self.roster.left.remote(self.name), self.sae.wait_limit_s, "roster"
                )
        except (SaerayError, RayError):
            pass  # the roster is gone, and with it what there was to withdraw from

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Next to nothing (Tune refuses zero), and on the head node.

        Tune's own files are seen there even on a cluster without shared storage.

        Raises:
            ConfigError: the experiment's scheduler is one that can't be had.
        """
        from saeray.cluster.stopping import refuse_takeover_by_the_caller

        refuse_takeover_by_the_caller()
        return tune.PlacementGroupFactory([{HEAD: HEAD_SHARE} if has_head() else {"CPU": 0.001}])


def one_sae(config: LanguageModelSAERunnerConfig) -> LanguageModelSAERunnerConfig:
    """The config of a trial, which is one SAE's.

    Raises:
        ConfigError: it describes a whole sweep.
    """
    for name in (*grid_axes(config), *(n for n in ("grid", "scheduler") if getattr(config, n))):
        raise bad_value(
            name,
            getattr(config, name),
            "a trial is one SAE; give Tune the grid (tune.grid_search([…]), tune.choice([…])) and "
            "the scheduler, or take saeray.sweep.",
        )
    if config.features:
        raise bad_value(
            "features",
            config.features,
            "are of a sweep's frontier; `saeray features` makes pages once tune.run has ended.",
        )
    return config
