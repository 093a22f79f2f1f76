"""`saeray features` as it was typed: where it runs, and one feature for the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext

from saeray.client.connect import chosen, connected, is_jobs, is_outside
from saeray.client.features import chosen_saes, make, make_there, sweep_and_saes, to_gather
from saeray.client.result import load_sweep
from saeray.errors import bad_value, printable
from saeray.files import feature_data
from saeray.files.storage import Folder
from saeray.spec.features import Wanted


def features_command(arguments: argparse.Namespace) -> int:
    wanted = Wanted(
        (), arguments.tokens, arguments.top, arguments.harvesters,
        tuple(dict.fromkeys(["pages", *arguments.format])),
    ).checked()  # fmt: skip
    address = chosen(arguments.address)
    if is_jobs(address):
        from saeray.client.jobs import command_as_job

        assert address is not None
        return command_as_job(words(arguments, wanted), address)

    def say(text: str) -> None:
        print(printable(text), file=sys.stderr, flush=True)

    if is_outside(address):
        with connected(address, arguments.namespace):
            return outside(arguments, wanted, say)
    sweep, given = sweep_and_saes(arguments.sweep, Folder.at)
    load_sweep(sweep.uri)  # what is wrong with it is said before anything is started
    wanted = wanted._replace(saes=chosen_saes(sweep, given))
    one = arguments.feature
    if one is not None and given is None and len(wanted.saes) > 1:
        raise bad_value("--feature", one, "of which SAE? Name it: SWEEP/SAE.")
    if one is not None and one < 0:
        raise bad_value("--feature", one, "at least 0.")
    missing = to_gather(sweep, wanted)
    with connected(address, arguments.namespace) if missing.saes else nullcontext():
        make(sweep, wanted, say, missing)
    if one is not None:
        (name,) = wanted.saes
        print(printable("\n".join(described(sweep, name, one))))
    return 0


def outside(arguments: argparse.Namespace, wanted: Wanted, say: Callable[[str], None]) -> int:
    """On a cluster that this process is a client of: by a task on its head node."""
    import ray

    from saeray.actors.head_folder import seen_from_here
    from saeray.actors.nodes import on_head
    from saeray.actors.waiting import get
    from saeray.client.driver import over_there

    sweep, given = sweep_and_saes(over_there(arguments.sweep), seen_from_here)
    wanted = wanted._replace(saes=chosen_saes(sweep, given))
    task = ray.remote(make_there).options(num_cpus=0, max_retries=3, **on_head())
    for text in get(task.remote(sweep.uri, wanted), LONGEST_SECONDS, "the cluster"):
        say(text)
    if arguments.feature is not None:
        (name,) = wanted.saes
        print(printable("\n".join(described(sweep, name, arguments.feature))))
    return 0


LONGEST_SECONDS = 24 * 3600.0  # that a pass on a cluster is waited for


def words(arguments: argparse.Namespace, wanted: Wanted) -> list[str]:
    """The command again, for a job."""
    from saeray.client.jobs import below_home

    found = ["features", below_home(arguments.sweep), "--tokens", str(wanted.tokens)]
    found += ["--top", str(wanted.top)]
    for option in ("feature", "harvesters"):
        if getattr(arguments, option) is not None:
            found += [f"--{option}", str(getattr(arguments, option))]
    for kind in wanted.formats[1:]:
        found += ["--format", kind]
    return found


def described(sweep: Folder, name: str, feature: int) -> list[str]:
    """Lines on one feature: what the page shows, for a terminal.

    Raises:
        ConfigError: the SAE has no such feature.
    """
    folder = sweep / feature_data.PLACE / name
    data = feature_data.read(folder)
    if feature >= len(data):
        raise bad_value("--feature", feature, f"{name} has {len(data):,}, from 0.")
    fired = int(data.fired[feature])
    lines = [
        f"feature {feature} of {name}",
        f"  fires on {fired:,} of {data.n_tokens:,} tokens ({fired / data.n_tokens:.3%}), largest "
        f"{float(data.arrays['largest'][feature]):.4g}",
    ]
    for which, verb in (("top", "raises"), ("bottom", "lowers")):
        effects = data.effects(feature, which)
        if effects:
            listed = " · ".join(f"{data.text(e.token)!r} {e.logit:.2f}" for e in effects)
            lines.append(f"  {verb} {listed}")
    near = " · ".join(f"{j} ({cosine:.2f})" for j, cosine in data.neighbours(feature))
    lines.append(f"  nearest decoder rows: {near}")
    lines += [f"  {c.peak:>8.4g}  {in_words(data, c)}" for c in data.top(feature)]
    for band in data.bands(feature):
        if band.contexts:
            lines.append(f"  {band.low:.3g} to {band.high:.3g} ({band.tokens:,} tokens)")
            lines += [f"  {c.peak:>8.4g}  {in_words(data, c)}" for c in band.contexts]
    return [*lines, f"  {(folder / 'feature.html').uri}#{feature}"]


def in_words(data: feature_data.FeatureData, c: feature_data.Context) -> str:
    """A context around its peak, which stands between » and «, on one line."""
    texts = [data.text(int(t)) for t in data.tokens[c.window]]
    before, after = max(0, c.position - 16), c.position + 9
    around = [f"»{t}«" if i == c.position else t for i, t in enumerate(texts)][before:after]
    return "".join(around).replace("\n", "↵").replace("\t", "⇥")
