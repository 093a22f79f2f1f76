"""What a wheel installs: all that the package needs, and a demo that runs without a checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from support.bundled import ROOT

from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder
from saeray.version import __version__

try:
    import setuptools
except ImportError:  # as in an environment of Python 3.12 or newer
    setuptools = None

BUILT_OF = ("pyproject.toml", "README.md", "LICENSE")
LEFT_OUT = ("__pycache__", "*.pyc")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of a copy, so nothing is left in the checkout; by the setuptools there is, if new."""
    source = tmp_path_factory.mktemp("source")
    for name in BUILT_OF:
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "saeray", source / "saeray", ignore=shutil.ignore_patterns(*LEFT_OUT))
    target = tmp_path_factory.mktemp("wheel")
    new = setuptools is not None and int(setuptools.__version__.split(".")[0]) >= 77
    offline = ("--no-build-isolation", "--no-index") if new else ()
    pip("wheel", "--no-deps", *offline, "-w", target, source)
    (made,) = target.iterdir()
    return made


def pip(*arguments, python=sys.executable):
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_of_the_package_is_in_it(wheel):
    assert wheel.name == f"saeray-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        inside = {n for n in archive.namelist() if n.startswith("saeray/")}
        (entry_points,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        assert "saeray = saeray.client.cli:main" in archive.read(entry_points).decode()
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "saeray").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"saeray/py.typed", "saeray/models/demo.yaml"} <= wanted
    assert "saeray/models/tiny-python/model.safetensors" in wanted
    assert "saeray/report/assets/plotly-basic.min.js" in wanted
    assert inside == wanted


@pytest.mark.slow
def test_the_demo_runs_outside_of_the_checkout(wheel, tmp_path):
    place = tmp_path / "environment"
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    pip("install", "--no-deps", "--no-index", wheel, python=python)
    # The other packages are those of this environment: a line of a .pth is a folder to search.
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    others = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
    others |= {p for p in sys.path if p.endswith("site-packages")}
    Path(own, "others.pth").write_text("\n".join(sorted(others)) + "\n")

    outside = tmp_path / "outside"
    outside.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", "import saeray; print(saeray.__file__)"],
        cwd=outside,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(own)
    done = subprocess.run(
        [place / "bin" / "saeray", "demo", "here"],
        cwd=outside,
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (outside / "here").iterdir()
    assert folder.name.startswith("demo-")
    rows = SweepFolder(Folder.at(folder), folder.name).read_rows()
    assert [row["status"] for row in rows] == ["done"] * 6
    assert (folder / "report.html").stat().st_size > 500_000  # plotly is inside
    assert f"saeray best {folder} --l0 30" in done.stdout
