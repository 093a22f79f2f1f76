"""What a sweep says when it is ended, and what stands in its folder from the first second."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from support.configs import config

from saeray.client import ending, runner
from saeray.client.cli import load_sweep_file
from saeray.client.session import ask_for, forget_refused, given_fields, saes_of
from saeray.errors import ConfigError
from saeray.files.storage import Folder
from saeray.files.sweep_folder import Outcome, SweepFolder
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.spec.grid import expand


@pytest.fixture
def asked(tmp_path):
    """A sweep that was asked for, and nothing else; its config."""
    c = config(
        lr=[1e-3, 2e-3], name="mine", storage_path=str(tmp_path), resources=dict(harvesters=2)
    )
    ask_for(Folder.at(tmp_path / "mine"), c, expand(resolve(c)))
    return c


def test_a_sweep_can_be_resumed_before_anything_runs(asked, tmp_path):
    place = Folder.at(tmp_path / "mine")
    assert [s.config for s in saes_of(place)] == [s.config for s in expand(resolve(asked))]
    with pytest.raises(ConfigError, match="--resume"):
        ask_for(place, asked, expand(resolve(asked)))


def test_its_sweep_yaml_can_be_run_again(asked, tmp_path):
    given = load_sweep_file(tmp_path / "mine" / "sweep.yaml", ["seed=3"])
    assert given["lr"] == [1e-3, 2e-3]
    assert given["resources"] == {"harvesters": 2}
    assert "name" not in given
    again = LanguageModelSAERunnerConfig.from_dict(given)
    assert again == asked.replace(name=None, seed=3)
    # The roster writes it again, with what the sweep runs on; what was asked for stays.
    files = SweepFolder(Folder.at(tmp_path / "mine"), "mine")
    files.write_sweep_yaml(files.read_configs(), {}, {"harvesters": 2})
    assert load_sweep_file(tmp_path / "mine" / "sweep.yaml") == given_fields(asked)


def test_refused_input_leaves_no_folder_but_nothing_that_was_trained_goes(asked, tmp_path):
    log = tmp_path / "mine" / "trials" / "a" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("{}")
    forget_refused(Folder.at(tmp_path / "mine"))
    assert log.exists()
    log.unlink()
    forget_refused(Folder.at(tmp_path / "mine"))
    assert not (tmp_path / "mine").exists()


def test_where_no_ray_answers_no_folder_is_left(tmp_path, monkeypatch):
    """It is there while Ray is being started: from then on the sweep can be resumed."""

    def connected(*_):
        assert saes_of(Folder.at(tmp_path / "mine"))
        raise ConfigError("no Ray cluster answers there")

    monkeypatch.setattr(runner, "connected", connected)
    with pytest.raises(ConfigError, match="no Ray cluster"):
        runner.sweep(config(), name="mine", storage_path=tmp_path)
    assert not (tmp_path / "mine").exists()


def test_the_last_words_name_what_is_saved_and_the_command_that_goes_on(asked, tmp_path):
    place = Folder.at(tmp_path / "mine")
    assert ending.epitaph(place) == (
        "interrupted; no SAE is saved yet. It goes on with: "
        f"saeray sweep --resume {tmp_path / 'mine'}"
    )
    one, two = expand(resolve(asked))
    rows = [
        Outcome(one.name, one.config, "done", "path", {}, None),
        Outcome(two.name, two.config, "interrupted", None, {}, None),
    ]
    SweepFolder(place, "mine").write_results(rows)
    (tmp_path / "mine" / "trials" / two.name / "checkpoints" / "2048").mkdir(parents=True)
    words = "of 2 SAEs 1 ended, 1 saved at 2,048 tokens"
    with pytest.raises(ending.Ended, match=words), ending.driving(place):
        raise KeyboardInterrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_the_end_is_said_at_once(asked, tmp_path, capsys, number):
    # As in a terminal's foreground, however these tests were started.
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGTERM: ending.end,
    }
    kept = {n: signal.signal(n, handler) for n, handler in handlers.items()}
    try:
        with pytest.raises(ending.Ended), ending.driving(Folder.at(tmp_path / "mine")):
            try:
                os.kill(os.getpid(), number)
                time.sleep(10)
            finally:  # what takes long
                said = capsys.readouterr().err
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        for n, handler in kept.items():
            signal.signal(n, handler)
    assert f"{number.name}: stopping" in said
    assert str(tmp_path / "mine") in said


def test_sigterm_ends_an_actors_process_whatever_its_handler_was():
    """Called in a thread, as an async actor is made in one."""
    program = """
import signal, threading, time
from saeray.actors.make import end_at_sigterm
signal.signal(signal.SIGTERM, lambda *_: None)
thread = threading.Thread(target=end_at_sigterm)
thread.start()
thread.join()
print("ready", flush=True)
time.sleep(30)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(timeout=20) == -signal.SIGTERM


def test_what_a_sweep_has_written_before_there_was_a_config_is_no_sweep_file(tmp_path):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"name": "old", "saes": {}}))
    with pytest.raises(ConfigError):
        LanguageModelSAERunnerConfig.from_dict(load_sweep_file(tmp_path / "sweep.yaml"))
