"""The `resources:` section of a config: how much of a machine or cluster each role takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from saeray.errors import ConfigError, bad_value, nearest
from saeray.spec.checks import AUTO, check_types, of_type


@dataclass(frozen=True, kw_only=True)
class Resources:
    """How much of the machine or cluster each role takes. "auto" fits what is there."""

    harvesters: int | str = AUTO  # language-model actors
    harvester_cpus: float = 0.5  # what Ray reserves for each of them
    harvester_gpus: float | str = AUTO  # "auto": 1 where device is cuda (shared when scarce)
    saes_per_trainer: int | str = AUTO  # SAEs that one worker group trains from one reader
    num_workers: int = 1  # ranks of each worker group
    trainer_cpus: float | str = AUTO  # threads of each rank; reserved with Ray
    trainer_gpus: float | str = AUTO
    # Custom resources and node labels, as the cluster's nodes have them: {harvester: 1},
    # {market: spot}; of labels also {market: "!spot"}, {zone: "in(a, b)"}
    harvester_resources: dict[str, float] = field(default_factory=dict)
    trainer_resources: dict[str, float] = field(default_factory=dict)
    harvester_labels: dict[str, str] = field(default_factory=dict)
    trainer_labels: dict[str, str] = field(default_factory=dict)
    node_wait_s: float = 1200.0  # how long nodes that an autoscaler starts are waited for

    def __post_init__(self) -> None:
        check_types(self, "resources.")
        check_custom_resources(self)
        if self.node_wait_s <= 0:
            raise bad_value("resources.node_wait_s", self.node_wait_s, "above 0.")
        for name in ("harvesters", "saes_per_trainer", "num_workers"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise bad_value(f"resources.{name}", value, 'at least 1, or "auto".')
        for name in ("harvester_cpus", "trainer_cpus", "harvester_gpus", "trainer_gpus"):
            value = getattr(self, name)
            if isinstance(value, str):
                continue
            refuse_amount(f"resources.{name}", value)
        for name in ("harvesters", "saes_per_trainer", "trainer_cpus"):
            value = getattr(self, name)
            if isinstance(value, str) and value != AUTO:
                raise bad_value(f"resources.{name}", value, 'a number or "auto".')


def refuse_amount(name: str, value: float) -> None:
    if value < 0 or (value > 1 and value != int(value)):
        raise bad_value(
            name, value, "Ray takes a fraction up to 1 (0.5) or a whole number above it (2)."
        )


LABEL_VALUE = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
LABEL = re.compile(rf"!?{LABEL_VALUE}|!?in\({LABEL_VALUE}(?:, ?{LABEL_VALUE})*\)")


def check_custom_resources(resources: Resources) -> None:
    """`{name: amount}` and `{label: value}` hold what their names say."""
    for name in ("harvester_resources", "trainer_resources"):
        checked = {}
        for key, value in getattr(resources, name).items():
            of_type(f"resources.{name}", key, (str,))
            if key in ("CPU", "GPU"):
                raise bad_value(
                    f"resources.{name}",
                    key,
                    f"has its own field, {name.split('_')[0]}_{key.lower()}s.",
                )
            checked[key] = of_type(f"resources.{name}.{key}", value, (float,))
            refuse_amount(f"resources.{name}.{key}", checked[key])
        object.__setattr__(resources, name, checked)
    for name in ("harvester_labels", "trainer_labels"):
        for key, value in getattr(resources, name).items():
            of_type(f"resources.{name}", key, (str,))
            of_type(f"resources.{name}.{key}", value, (str,))
            if not LABEL.fullmatch(value):
                raise bad_value(
                    f"resources.{name}.{key}",
                    value,
                    "a label's value is wanted, of letters, digits and - _ . inside it, or one of "
                    "Ray's selectors: !a, in(a, b), !in(a, b).",
                )


def resources_from(data: Mapping[str, Any]) -> Resources:
    """Reads the `resources:` section, refusing keys that no field has."""
    known = {f.name for f in fields(Resources)}
    for key in data:
        if key not in known:
            raise ConfigError(f"resources: unknown key {key!r}; {nearest(str(key), known)}")
    return Resources(**data)
