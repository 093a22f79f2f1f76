"""`saeray push`, `pull`, `export`: against a server on loopback that answers as the hub does."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from support.finished import finished, sae
from support.model_hub import ModelHub, is_the_hub_of_this_process
from support.peers_python import python_with
from support.published import config_of, trained

import saeray
from saeray.client.cli import main
from saeray.files.init_from import started_from

NAMES = ("l1=0.004", "l1=0.001")


@pytest.fixture
def hub():
    hub = ModelHub()
    yield hub
    hub.close()


PLACES = dict(activation_cache="/home/somebody/cache", storage_path="/home/somebody/results")


@pytest.fixture
def sweep(tmp_path):
    """Two SAEs on the frontier, and one that is not trained."""
    eye = torch.eye(4)
    saes = {
        NAMES[0]: sae(10.0, 0.7, 0.8, l1_coefficient=4e-3, W_dec=eye, **PLACES),
        NAMES[1]: sae(48.0, 0.9, 0.9, l1_coefficient=1e-3, W_dec=2 * eye, **PLACES),
        "gone": sae(49.0, 0.99, 0.99, state="interrupted", l1_coefficient=2e-3, **PLACES),
    }
    folder = finished(tmp_path / "results" / "mine", **saes)
    (folder / "trials" / NAMES[0]).write("metrics.jsonl", b'{"step": 1}\n')
    return folder


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """This process' hub is this one; a folder of its own, and a token."""
    is_the_hub_of_this_process(hub, monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_a_process(hub, where, *arguments):
    """The command, in a process whose environment says where the hub is: (code, out, err)."""
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(where / "hf"),
        "HF_TOKEN": "hf_right",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    others = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-m", "saeray", *arguments],
        env=others | own,
        cwd=where,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def front_matter(readme):
    return yaml.safe_load(readme.split("---\n")[1])


def test_a_sweep_goes_to_the_hub_and_comes_back(hub, sweep, here):
    assert in_a_process(hub, here, "push", sweep.path, "me/saes") == (
        0,
        f"{hub.url}/me/saes\n",
        "",
    )
    assert in_a_process(hub, here, "pull", "me/saes", "home") == (0, f"{here / 'home'}\n", "")
    files = hub.repos["me/saes"]
    own = ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")
    assert {*files} == {
        *(f"{name}/{file}" for name in NAMES for file in own), f"{NAMES[0]}/metrics.jsonl",
        "README.md", "sweep.yaml", "results.csv", "results.parquet", "pareto.png",
    }  # fmt: skip
    # In one commit; large files as huggingface_hub sends them, by hf_xet.
    asked = [path for _, path in hub.asked]
    assert asked.count("/api/models/me/saes/commit/main") == 1
    assert "/api/models/me/saes/xet-write-token/main" in asked
    assert any(path.startswith("/cas/v1/xorb-grants/") for path in asked)
    final = sweep / "trials" / NAMES[0] / "final"
    weights = "sae_weights.safetensors"
    assert files[f"{NAMES[0]}/{weights}"] == final.read(weights)
    # No key, and no folder of this machine.
    for path, data in files.items():
        assert b"hf_right" not in data and str(here).encode() not in data, path
        assert b"/home/somebody" not in data, path
    # Home again it is a sweep.
    home, before = saeray.load_sweep(here / "home"), saeray.load_sweep(sweep.path)
    assert [r["trial"] for r in home.rows] == [*NAMES]
    for row, old in zip(home.rows, before.rows, strict=False):
        assert row == old | {"path": home.final(row).uri}
        assert torch.equal(home.load(row).W_dec, before.load(row["trial"]).W_dec)
    assert home.best(l0=50)["trial"] == NAMES[1]
    log = here / "home" / "trials" / NAMES[0] / "metrics.jsonl"
    assert log.read_text() == '{"step": 1}\n'
    assert torch.equal(saeray.load_sae(f"me/saes/{NAMES[1]}").W_dec, 2 * torch.eye(4))
    with pytest.raises(saeray.ConfigError, match=r"there are 2 SAEs: .*; me/saes/NAME takes one"):
        saeray.load_sae("me/saes")


def test_the_card_has_figures_the_frontier_and_the_config(hub, sweep, here):
    assert saeray.push(sweep.path, "me/saes") == f"{hub.url}/me/saes"
    readme = hub.repos["me/saes"]["README.md"].decode()
    told = front_matter(readme)
    assert told["library_name"] == "saelens"  # as sae_lens's own uploads
    assert {"saelens", "sparse-autoencoder"} <= {*told["tags"]}
    assert "license" not in told
    assert f"| `{NAMES[0]}` | 10.0 | 0.3000 | 0.8000 | 3 | 80 | FVU CE |" in readme
    assert f"| `{NAMES[1]}` | 48.0 | 0.1000 | 0.9000 | 3 | 80 | FVU CE |" in readme
    assert "gone" not in readme
    assert f'SAE.from_pretrained("me/saes", "{NAMES[0]}")' in readme
    common = yaml.safe_load(readme.split("```yaml\n")[1].split("```")[0])
    assert common["hook_point"] == "blocks.2.hook_resid_pre" and common["training_tokens"] == 80
    assert "l1_coefficient" not in common and "storage_path" not in common


def test_saes_are_pushed_one_by_one(hub, sweep, here, monkeypatch, capsys):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the older way for large files
    assert main(["push", f"{sweep.path}/{NAMES[0]}", "me/saes", "--license", "mit"]) == 0
    assert "/me/saes.git/info/lfs/objects/batch" in [path for _, path in hub.asked]
    files = hub.repos["me/saes"]
    assert f"{NAMES[1]}/cfg.json" not in files
    assert front_matter(files["README.md"].decode())["license"] == "mit"
    written = files["README.md"].decode().replace("# mine", "# Mine\n\nAs in the paper.")
    files["README.md"] = written.replace("license: mit", "license: cc0-1.0").encode()
    saeray.push((sweep / "trials" / NAMES[1] / "final").path, "me/saes")
    assert {f"{NAMES[0]}/cfg.json", f"{NAMES[1]}/cfg.json"} <= {*files}
    readme = files["README.md"].decode()
    assert all(f"| `{name}` |" in readme for name in NAMES)
    # What somebody has written there stays.
    assert "As in the paper." in readme and front_matter(readme)["license"] == "cc0-1.0"
    # All of what was pushed comes home, or one of it.
    saeray.pull("me/saes", "both")
    assert [r["trial"] for r in saeray.load_sweep("both").rows] == [*NAMES]
    saeray.pull(f"me/saes/{NAMES[1]}", "one")
    assert [r["trial"] for r in saeray.load_sweep("one").rows] == [NAMES[1]]
    other = finished(
        here / "other",
        **{NAMES[0]: sae(9.0, 0.7, 0.8, l1_coefficient=4e-3, lr=7e-3, W_dec=torch.eye(4))},
    )
    assert main(["push", other.path, "me/saes"]) == 2
    said = f"has another SAE called {NAMES[0]} (lr = 0.0003, here 0.007)"
    assert said in capsys.readouterr().err


def test_what_is_private_stays_private(hub, sweep, here, monkeypatch, capsys):
    hub.repos["me/public"] = {"README.md": b"# There\n"}
    assert main(["push", sweep.path, "me/hidden", "--private"]) == 0
    assert hub.private == {"me/hidden"}
    assert main(["push", sweep.path, "me/public", "--private"]) == 2
    assert "is public already" in capsys.readouterr().err
    assert [*hub.repos["me/public"]] == ["README.md"]
    monkeypatch.delenv("HF_TOKEN")
    assert main(["pull", "me/hidden", "x"]) == 2
    said = capsys.readouterr().err
    assert "no such repository, or it is private (HF_TOKEN, or `hf auth login`, gives a" in said
    assert main(["push", sweep.path, "me/new"]) == 2
    assert "not allowed (HF_TOKEN, or `hf auth login`, gives" in capsys.readouterr().err
    assert "me/new" not in hub.repos and not (here / "x").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert main(["push", sweep.path, "me/new"]) == 2
    said = capsys.readouterr().err
    assert "the one in use has no right to it" in said and "hf_other" not in said


def test_repositories_of_others(hub, sweep, here):
    final = sweep / "trials" / NAMES[0] / "final"
    files = {name: final.read(name) for name in ("cfg.json", "sae_weights.safetensors")}
    hub.repos["them/saes"] = {
        f"{folder}/{name}": data for folder in ("a/b", "c") for name, data in files.items()
    } | {"c/other.bin": b"1"}
    hub.repos["them/nothing"] = {"x.txt": b""}
    hub.repos["them/bad"] = {"../../out/cfg.json": files["cfg.json"]}
    (here / "full").mkdir()
    (here / "full" / "x").touch()
    assert saeray.pull("them/saes") == str(here / "saes")
    kept = sorted(str(p.relative_to(here / "saes")) for p in (here / "saes").rglob("*.*"))
    assert kept == [f"{f}/{n}" for f in ("a/b", "c") for n in files]
    saeray.pull("them/saes/c", "one")
    assert [p.name for p in (here / "one").iterdir()] == ["c"]
    assert torch.equal(saeray.load_sae("one/c").W_dec, torch.eye(4))
    assert torch.equal(saeray.load_sae("them/saes/a").W_dec, torch.eye(4))  # all there is in it
    for call, said in (
        (lambda: saeray.pull("them/nothing"), "no SAE is there"),
        (lambda: saeray.pull("them/bad"), "leads out of the folder"),
        (lambda: saeray.pull("them/saes", "full"), "is there and not empty"),
        (lambda: saeray.load_sae("them/missing"), "no such repository, or it is private"),
        (lambda: saeray.load_sae("them/saes@v2/c"), "has no such revision"),
    ):
        with pytest.raises(saeray.ConfigError, match=said):
            call()
    assert not [p for p in here.iterdir() if p.name.startswith(".")]


def test_training_starts_from_an_sae_on_the_hub(hub, here):
    trained(here / "it", "standard")
    hub.repos["them/saes"] = {f"x/{p.name}": p.read_bytes() for p in (here / "it").iterdir()}
    began = started_from(config_of("standard", init_from="them/saes/x", decoder_norm="free"), 4)
    assert torch.equal(began.W_enc, saeray.load_sae(here / "it").W_enc)
    with pytest.raises(saeray.ConfigError, match=r"them/saes/y: no SAE is there"):
        started_from(config_of("standard", init_from="them/saes/y"), 4)
    hub.close()  # without a net it is what was loaded last
    hub.server.server_close()
    assert torch.equal(saeray.load_sae("them/saes/x").W_enc, began.W_enc)


def test_a_hub_that_does_not_answer(hub, sweep, here, capsys):
    hub.close()
    hub.server.server_close()
    assert main(["push", sweep.path, "me/saes"]) == 1
    assert f"me/saes on {hub.url}: can't be reached" in capsys.readouterr().err


def test_what_is_no_sae_or_repository_is_said(sweep, tmp_path, capsys):
    for arguments, said in (
        (["push", sweep.path, "saes"], "REPO = 'saes': user/repo is wanted"),
        (["push", sweep.path, "me/saes/x"], "user/repo is wanted"),
        (["push", str(tmp_path), "me/saes"], "there is no sweep.yaml"),
        (["push", f"{sweep.path}/gone", "me/saes"], "SAE = 'gone': in"),
        (["push", f"{sweep.path}/l1=0.002", "me/saes"], "did you mean l1=0.004 or l1=0.001"),
        (["export", sweep.path, "--format", "sae-lens"], "did you mean sae_lens"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err


def test_export_of_a_sweep_and_of_one_sae(sweep, tmp_path, capsys):
    assert main(["export", sweep.path, "--format", "dictionary_learning"]) == 0
    out = capsys.readouterr().out.splitlines()
    folders = {name: f"{sweep.path}/export/dictionary_learning/{name}" for name in NAMES}
    assert out == [f"{name}: {folder}" for name, folder in folders.items()]
    for folder in folders.values():
        assert sorted(os.listdir(folder)) == ["ae.pt", "config.json"]
    assert saeray.export(f"{sweep.path}/{NAMES[1]}", "saebench", tmp_path / "out") == {
        NAMES[1]: str(tmp_path / "out" / NAMES[1])
    }
    loaded = saeray.load_sae(tmp_path / "out" / NAMES[1])
    torch.testing.assert_close(loaded.W_dec, torch.eye(4))
    # Of a sweep of which one can't be held nothing is written.
    saes = {f"k={k}": sae(k, 0.9, 0.9, architecture="batchtopk", k=k) for k in (2.0, 2.5)}
    mixed = finished(tmp_path / "mixed", **saes)
    for name, k in (("k=2.0", 2.0), ("k=2.5", 2.5)):
        trained((mixed / "trials" / name / "final").path, "batchtopk", k=k)
    assert main(["export", mixed.path, "--format", "dictionary_learning"]) == 2
    assert "k=2.5: dictionary_learning can't hold it: k = 2.5" in capsys.readouterr().err
    assert "export" not in mixed.names()


IN_SAE_LENS = """
import sys, torch
from sae_lens import SAE
sae = SAE.from_pretrained("me/saes", sys.argv[1])
print("RESULT", sae.W_dec.tolist(), sae.cfg.metadata.hook_name)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sae_lens_finds_it_on_the_hub(hub, sweep, here):
    python = python_with("sae_lens")
    saeray.push(sweep.path, "me/saes")
    done = subprocess.run(
        [python, "-c", IN_SAE_LENS, NAMES[1]],
        env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(here / "theirs")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"RESULT {(2 * torch.eye(4)).tolist()} blocks.2.hook_resid_pre" in done.stdout
