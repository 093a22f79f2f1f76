"""README.md of a repository of SAEs: what they are of, their figures, how to load them.

The licence is for its owner to say: no field is written for it unless one is given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import yaml

from saeray.files import frontier
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.version import __version__

# `library_name` is what the hub and sae_lens's own uploads go by.
LIBRARY = "saelens"
TAGS = ("saelens", "saeray", "sparse-autoencoder", "interpretability")
COLUMNS = {
    "L0": ("l0", ".1f"),
    "FVU": ("fvu", ".4f"),
    "CE score": ("ce_loss_score", ".4f"),
    "MCC": ("mcc", ".3f"),
    "dead": ("dead_features", ".0f"),
    "tokens": ("n_training_tokens", ",.0f"),
}
BEGIN, END = "<!-- saeray: begin -->", "<!-- saeray: end -->"
# Of a machine or a session, not of an SAE: they are of no use elsewhere.
OF_THE_MACHINE = (
    "storage_path", "checkpoint_path", "activation_cache", "resources", "device", "wandb_entity",
    "wandb_project", "log_to_wandb", "name", "share_stream", "wait_limit_s", "reader_lag_s",
    "checkpoint_every_s", "buffer_bytes",
)  # fmt: skip


class Card(NamedTuple):
    """What a card is made of."""

    repo: str
    title: str
    rows: Sequence[Mapping[str, Any]]  # results.csv's, of the SAEs in the repository
    configs: Mapping[str, LanguageModelSAERunnerConfig]  # by SAE
    license: str | None = None
    there: str = ""  # the README.md that is there


def written(card: Card) -> str:
    """The whole README.md: what is there, with our part between its two marks anew."""
    configs = [card.configs[row["trial"]] for row in card.rows]
    lines = [BEGIN, of_what(configs), "", *table(card.rows), "", *frontiers(card.rows)]
    part = "\n".join([*lines, *loading(card), *config_of(card, configs), END])
    before, body = parted(card.there)
    if BEGIN in body and END in body:
        head, _, rest = body.partition(BEGIN)
        body = head + part + rest.partition(END)[2]
    else:
        body = f"{body.strip() or f'# {card.title}'}\n\n{part}\n"
    return f"---\n{front_matter(card, configs, before)}\n---\n{body.lstrip()}"


def parted(text: str) -> tuple[dict[str, Any], str]:
    """A README's front matter and the rest."""
    found = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    if found is None:
        return {}, text
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}, text[found.end() :]
    return (data if isinstance(data, dict) else {}), text[found.end() :]


def front_matter(
    card: Card, configs: Sequence[LanguageModelSAERunnerConfig], before: Mapping[str, Any]
) -> str:
    """YAML: ours, and what somebody has written there beside it or in its place."""
    data: dict[str, Any] = {"library_name": LIBRARY, "tags": list(TAGS)}
    models = [c.model_name for c in configs if is_hub_name(c.model_name)]
    texts = [c.dataset_path for c in configs if is_hub_name(c.dataset_path)]
    if models:
        data["base_model"] = list(dict.fromkeys(models))
    if texts:
        data["datasets"] = list(dict.fromkeys(texts))
    data |= before
    if card.license is not None:
        data["license"] = card.license
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True).strip()


def is_hub_name(name: str) -> bool:
    """`user/repo`, so that the hub can link it; the aliases and paths it would refuse."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~")) and ":" not in name


def shown_name(name: str) -> str:
    """A model or text, without the folders of somebody's machine."""
    return PurePosixPath(name).name if name.startswith(("/", "~", ".")) else name


def of_what(configs: Sequence[LanguageModelSAERunnerConfig]) -> str:
    """One paragraph."""
    hooks = dict.fromkeys(
        f"`{c.resolved_hook_point}` of `{shown_name(c.model_name)}`" for c in configs
    )
    texts = dict.fromkeys(f"`{shown_name(c.dataset_path)}`" for c in configs)
    kinds = dict.fromkeys(c.architecture for c in configs)
    n = len(configs)
    return (
        f"{n} sparse autoencoder{'s' * (n > 1)} ({', '.join(kinds)}) at {', '.join(hooks)}, "
        f"trained on {', '.join(texts)} with saeray {__version__}."
    )


def cell(value: Any, form: str) -> str:
    return "–" if value is None else format(float(value), form)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Held-out figures of every SAE, sparsest first, with the frontiers it is on."""
    columns = {
        title: (key, form)
        for title, (key, form) in COLUMNS.items()
        if any(frontier.figure(row, key) is not None for row in rows)
    }
    marks = {row["trial"]: mark for row, mark in zip(rows, frontier.marks(rows), strict=True)}
    lines = [
        "| SAE | " + " | ".join(columns) + " | frontier |",
        "|---|" + "---:|" * len(columns) + "---|",
    ]
    for row in sorted(rows, key=sparsest_first):
        cells = [cell(frontier.figure(row, key), form) for key, form in columns.values()]
        lines.append(f"| `{row['trial']}` | {' | '.join(cells)} | {marks[row['trial']]} |")
    return lines


def sparsest_first(row: Mapping[str, Any]) -> float:
    l0 = frontier.figure(row, "l0")
    return math.inf if l0 is None else l0


def frontiers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "Figures are of text that no SAE was trained on. L0: active features per token. FVU: "
        "share of variance unexplained, 1 − Σ‖x − x̂‖² / Σ‖x − mean‖². CE score: (zero-ablated − "
        "with SAE) / (zero-ablated − clean), 1 is perfect. dead: silent in the last full sampling "
        "window.",
    ]
    if any(frontier.marks(rows)):
        lines.append(
            "frontier: no sparser SAE here has a lower FVU (FVU), or a higher CE score (CE)."
        )
    return [*lines, ""]


def loading(card: Card) -> list[str]:
    name = card.rows[0]["trial"]
    return [
        "```python",
        "from sae_lens import SAE",
        "",
        f'sae = SAE.from_pretrained("{card.repo}", "{name}")',
        "```",
        "",
        "```python",
        "import saeray",
        "",
        f'sae = saeray.load_sae("{card.repo}/{name}")',
        "with saeray.spliced(sae) as inside:  # in its language model",
        '    logits = inside("some text")',
        "```",
        "",
    ]


def config_of(card: Card, configs: Sequence[LanguageModelSAERunnerConfig]) -> list[str]:
    """What all SAEs have in common, as a sweep file; each one's own stands in its cfg.json."""
    dicts = [published_config(c.to_dict()) for c in configs]
    common = {
        key: shown_name(value) if key in ("model_name", "dataset_path") else value
        for key, value in dicts[0].items()
        if value is not None and all(d[key] == value for d in dicts)
    }
    for name in OF_THE_MACHINE:
        common.pop(name, None)
    text = yaml.safe_dump(common, sort_keys=False, allow_unicode=True).strip()
    return ["Fields that all of them have:", "", "```yaml", text, "```"]


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the folders of the machine that it was trained on."""
    blank = {"storage_path": None, "activation_cache": None, "checkpoint_path": "checkpoints"}
    return config | {name: value for name, value in blank.items() if name in config}
