"""What `saeray --help` and `saeray COMMAND --help` teach with: examples, each of which parses."""

from __future__ import annotations

import argparse
from typing import Any

FIRST_STEPS = """\
first steps:
  saeray demo                               6 SAEs on a small bundled model, in about 2 minutes
  saeray demo --sweep-file > mine.yaml      a sweep file to begin with
  saeray fields lr                          what its fields mean
  saeray sweep mine.yaml --dry-run          check it all, and see the plan
  saeray sweep mine.yaml --name mine        train
  saeray best results/mine --l0 30          the SAE to take
  saeray features results/mine              what makes its features fire

`saeray COMMAND --help` has the options of a command, with examples."""

# By command: (command line, what it does).
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "demo": (
        ("saeray demo", "into results/demo-<time>"),
        ("saeray demo --sweep-file > mine.yaml", "its sweep file, as one to begin with"),
    ),
    "sweep": (
        ("saeray sweep mine.yaml --dry-run", "check it all, print the plan, train nothing"),
        ("saeray sweep mine.yaml --set 'lr=[1e-4, 4e-4]' --name mine", "with two learning rates"),
        ("saeray sweep --resume results/mine", "go on with one that was interrupted"),
        ("saeray sweep mine.yaml --address ray://HEAD:10001", "on a cluster"),
    ),
    "plan": (
        ("saeray plan mine.yaml", "20 seconds of measuring, then what it would take and limit"),
        ("saeray plan mine.yaml --tokens-per-s 50000", "from a speed that is known"),
    ),
    "status": (
        ("saeray status --address ray://HEAD:10001", "progress, time left, what limits, errors"),
    ),
    "stop": (("saeray stop mine --address ray://HEAD:10001", "--resume goes on with it"),),
    "fetch": (
        ("saeray fetch mine results/mine --address ray://HEAD:10001", "from a cluster"),
        ("saeray fetch s3://BUCKET/sweeps/mine results/mine", "from S3; no cluster is needed"),
    ),
    "best": (
        ("saeray best results/mine --l0 50", "the lowest FVU near 50 active features"),
        ("saeray best results/mine --l0 50 --by ce_loss_score", "the best language-model loss"),
    ),
    "compare": (
        ("saeray compare results/mine results/other", "one frontier of both"),
        ("saeray compare results/seeds --stability", "how alike SAEs of several seeds are"),
    ),
    "report": (
        ("saeray report results/mine", "results/mine/report.html; also of one that still runs"),
        ("saeray report results/mine s3://b/other --output both.html", "two on one page"),
    ),
    "features": (
        ("saeray features results/mine", "pages of all its SAEs"),
        ("saeray features results/mine/lr=0.001 --feature 7", "one feature, in the terminal"),
    ),
    "wandb": (("saeray wandb results/mine", "after a sweep without network, or a resumed one"),),
    "push": (
        ("saeray push results/mine user/repo --private", "all of its SAEs"),
        ("saeray push results/mine/lr=0.001 user/repo --license mit", "one of them"),
    ),
    "pull": (("saeray pull user/repo", "into ./repo"),),
    "export": (
        ("saeray export results/mine --format saebench", "into results/mine/export/saebench"),
    ),
    "fields": (
        ("saeray fields warm_up", "what has it in its name or text"),
        ("saeray fields", "all of them"),
    ),
}


def teach(top: argparse.ArgumentParser, commands: Any) -> None:
    """Puts the examples below the help of the command line and of each command."""
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    top.epilog = FIRST_STEPS
    for name, command in commands.choices.items():
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.description = said_of(commands, name)
        command.epilog = "\n".join(
            ["examples:", *(f"  {line}\n      {what}" for line, what in EXAMPLES.get(name, ()))]
        )


def said_of(commands: Any, name: str) -> str:
    """A command's line in the list of them, as a sentence."""
    (text,) = [action.help for action in commands._choices_actions if action.dest == name]
    return f"{text[0].upper()}{text[1:]}."
