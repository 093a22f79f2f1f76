"""`--resume` with changes: what may change, what is refused by name, what is in the folder then."""

import pytest
import yaml
from support.configs import config
from support.finished import finished, sae

import saeray
from saeray.client.changes import changes_from, checked, common_steps
from saeray.client.cli import as_given, main
from saeray.client.session import ask_for
from saeray.errors import ConfigError
from saeray.files.fetch import fetch_folder
from saeray.files.metrics_log import MetricsLog, read_lines
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder

CONSTANT = dict(lr_decay_steps=0)  # a rate that does not depend on where the training ends
SMALL = CONSTANT | dict(store_batch_size=1, context_size=4, n_batches_in_buffer=4)


@pytest.fixture
def sweep(tmp_path):
    """One SAE that is done (10 steps of 8 tokens) and one that was interrupted."""
    made = finished(
        tmp_path / "mine",
        done=sae(10.0, 0.7, 0.8, **SMALL),
        gone=sae(11.0, 0.7, 0.8, state="interrupted", lr=1e-2, **SMALL),
    )
    for name in ("done", "gone"):
        log = MetricsLog(made / "trials" / name)
        for step in (4, 8, 10):
            log.append(step, {"details/n_training_tokens": 8 * step, "eval/l0": 1.0 * step})
    return made


def checkpoint(folder, name, *tokens):
    for n in tokens:
        (folder / "trials" / name / "checkpoints" / str(n)).write("cfg.json", b"{}")


def test_where_it_runs_may_change(sweep):
    given = ["resources.harvesters=2", "resources.saes_per_trainer=1", "wait_limit_s=60"]
    checked(sweep, changes_from(given))()
    for c in SweepFolder(sweep, sweep.name).read_configs().values():
        assert (c.resources.harvesters, c.resources.saes_per_trainer) == (2, 1)
        assert c.wait_limit_s == 60.0
        assert c.training_tokens == 80
    rows = {r["trial"]: r["status"] for r in SweepFolder(sweep, sweep.name).read_rows()}
    assert rows == {"done": "done", "gone": "interrupted"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lr=1e-4", "lr: can't be changed by --resume.*training_tokens can"),
        ("resorces.harvesters=2", "resorces: unknown; did you mean resources"),
        ("resources.harvester=2", "resources: unknown key 'harvester'"),
        ("resources.harvesters=0", "resources.harvesters = 0: at least 1"),
        ("training_tokens=40", "training_tokens = 40: the sweep has 80; it can only be more"),
        ("training_tokens=[160, 320]", "training_tokens = .*: one whole number is wanted"),
        ("training_tokens=160", "done has ended, and no checkpoint of it is left"),
    ],
)
def test_what_cant_change_is_refused_by_name(sweep, given, said, capsys):
    before = sweep.files()
    with pytest.raises(ConfigError, match=said):
        saeray.resume(sweep.path, changes=changes_from([given]))
    assert main(["sweep", "--resume", sweep.path, "--set", given]) == 2
    assert given.partition("=")[0].partition(".")[0] in capsys.readouterr().err
    assert sweep.files() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr_scheduler_name", "cosineannealing"),
        ("lr_decay_steps", 2),
        ("target_l0", 10),
        ("architecture", "p_anneal"),
        ("feature_sampling_method", "anthropic"),
    ],
)
def test_what_depends_on_the_end_cant_be_longer(tmp_path, field, value):
    folder = finished(tmp_path / "one", x=sae(1.0, 0.7, 0.8, **CONSTANT | {field: value}))
    with pytest.raises(ConfigError, match=f"training_tokens: can't be raised where {field} is"):
        checked(folder, {"training_tokens": 160})
    checked(folder, {"resources": {"harvesters": 2}})


def test_more_tokens_go_on_from_a_checkpoint_that_both_trainings_share(sweep):
    """20 blocks of 4 rows in groups of 2: the last window, of 20 - 8, is served otherwise."""
    before = SweepFolder(sweep, sweep.name).read_configs()["done"]
    assert common_steps(before) == (18 * 4 - 4) // 8 == 8
    checkpoint(sweep, "done", 32, 64, 72)
    checkpoint(sweep, "gone", 32)
    checked(sweep, changes_from(["training_tokens=160"]))()
    files = SweepFolder(sweep, sweep.name)
    for name, kept, steps in (("done", ["32", "64"], [4, 8]), ("gone", ["32"], [4])):
        assert (sweep / "trials" / name / "checkpoints").names() == kept
        assert [line["step"] for line in read_lines(sweep / "trials" / name)] == steps
    assert {r["trial"]: (r["status"], r["path"]) for r in files.read_rows()} == {
        "done": ("interrupted", None), "gone": ("interrupted", None),
    }  # fmt: skip
    for c in files.read_configs().values():
        assert (c.steps, c.stream_tokens) == (20, 160)
        assert c.l1_warm_up_steps == 2  # a fifth of the steps that there were
    assert files.known(["done"])["done"].n_training_tokens == 64


def test_one_that_is_past_what_both_share_is_not_trained_otherwise(sweep):
    checkpoint(sweep, "done", 64)
    checkpoint(sweep, "gone", 72)
    with pytest.raises(ConfigError, match=r"gone is in the last window .*step 9.*up to 8\)"):
        checked(sweep, {"training_tokens": 160})


def test_an_axis_of_the_sweep_cant_change(tmp_path):
    folder = finished(
        tmp_path / "axis", a=sae(1.0, 0.7, 0.8), b=sae(1.0, 0.7, 0.8, training_tokens=160)
    )
    with pytest.raises(ConfigError, match="training_tokens: is an axis of the sweep"):
        checked(folder, {"training_tokens": 320})


def test_an_sae_that_went_on_is_fetched_again(tmp_path, capsys):
    """Its files have the sizes that they had."""
    there = finished(tmp_path / "there", a=sae(1.0, 0.7, 0.8), b=sae(2.0, 0.8, 0.8, lr=1e-2))
    for name in "ab":
        (there / "trials" / name / "final").write("sae_weights.safetensors", b"one")
    home = Folder.at(tmp_path / "home")
    fetch_folder(there, home)
    again = dict(a=sae(1.5, 0.7, 0.8), b=sae(2.0, 0.8, 0.8, lr=1e-2))
    there = finished(tmp_path / "there", **again)
    for name in "ab":
        (there / "trials" / name / "final").write("sae_weights.safetensors", b"two")
    fetch_folder(there, home)
    brought = [(home / "trials" / n / "final").read("sae_weights.safetensors") for n in "ab"]
    assert brought == [b"two", b"one"]


def test_the_sweep_file_as_given_is_kept(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("# what for\nlr: [1e-3, 2e-3]\n")
    given = as_given(str(file), ["lr=[1, 2]"])
    c = config(name="mine", storage_path=str(tmp_path))
    place = Folder.at(tmp_path / "mine")
    ask_for(place, c, [], given)
    kept = place.read("given.yaml").decode()
    assert kept == f"# saeray sweep {file}\n#   --set 'lr=[1, 2]'\n{file.read_text()}"


def test_the_fields_as_given_are_kept_with_the_changes(sweep):
    files = SweepFolder(sweep, sweep.name)
    files.write_sweep_yaml(
        files.read_configs(), {}, {}, {"lr": [3e-4, 1e-2], "resources": {"trainer_cpus": 1}}
    )
    checkpoint(sweep, "done", 64)
    checked(sweep, changes_from(["training_tokens=160", "resources.harvesters=2"]))()
    asked = yaml.safe_load(sweep.read("sweep.yaml"))["config"]
    assert asked["training_tokens"] == 160
    assert asked["resources"] == {"trainer_cpus": 1, "harvesters": 2}
    assert asked["lr"] == [3e-4, 1e-2]
    assert asked["l1_warm_up_steps"] == 2


@pytest.mark.slow
def test_an_sae_that_went_on_is_that_of_a_longer_sweep(ray_instance, tiny, tmp_path):
    """With more harvesters and other packs, too."""
    short = tiny | dict(
        lr=[1e-3, 2e-3], training_tokens=32 * 1024, n_checkpoints=2, l1_warm_up_steps=6, **CONSTANT
    )
    first = saeray.sweep(short, name="first", storage_path=tmp_path, live=False)
    assert first.ok
    changes = dict(training_tokens=48 * 1024, resources=dict(harvesters=2, saes_per_trainer=1))
    longer = saeray.resume(tmp_path / "first", live=False, changes=changes)
    whole = short | dict(training_tokens=48 * 1024)
    whole = saeray.sweep(whole, name="whole", storage_path=tmp_path, live=False)
    assert [r["status"] for r in longer.rows] == ["done"] * 2
    for row, other in zip(longer.rows, whole.rows, strict=True):
        assert row["n_training_tokens"] == 48 * 1024
        assert longer.final(row).read("sae_weights.safetensors") == whole.final(other).read(
            "sae_weights.safetensors"
        )
        one, two = (read_lines(r.folder / "trials" / row["trial"]) for r in (longer, whole))
        for line in (*one, *two):
            del line["details/training_seconds"]
        assert one == two
    again = yaml.safe_load((tmp_path / "first" / "sweep.yaml").read_text())["config"]
    assert again["training_tokens"] == 48 * 1024
    assert again["lr"] == [1e-3, 2e-3]
