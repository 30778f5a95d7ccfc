"""`pip install .` offers the optimizer's module and nothing else, and says whose and what it is."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from helpers import ROOT

BUILD = "sys.modules['torch'] = None; build.build_wheel('.'); build.build_sdist('.')"  # needs no torch


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What is built from a clone: the names of the wheel and of the source archive, and the metadata."""
    source = tmp_path_factory.mktemp("package")
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "MANIFEST.in",
        *(p.name for p in ROOT.glob("*.py")),
    ):
        shutil.copy(ROOT / name, source)
    (source / "tests").mkdir()
    (source / "tests/test_some.py").touch()
    command = f"import sys, setuptools.build_meta as build; {BUILD}"
    subprocess.run([sys.executable, "-c", command], cwd=source, check=True)
    with zipfile.ZipFile(*source.glob("*.whl")) as wheel, tarfile.open(*source.glob("*.tar.gz")) as archive:
        (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        yield wheel.namelist(), archive.getnames(), email.message_from_bytes(wheel.read(metadata))


def test_the_wheel_and_the_source_archive_hold_just_the_module(built):
    wheel, archive, _ = built
    assert [name for name in wheel if ".dist-info/" not in name] == ["grassmann_optimizer.py"]
    assert [name.split("/", 1)[1] for name in archive if name.endswith(".py")] == ["grassmann_optimizer.py"]


def test_the_metadata(built):
    metadata = built[2]
    floor = re.search(r"^torch>=.*$", (ROOT / "requirements.txt").read_text(), re.M)[0]
    assert metadata.get_all("Requires-Dist") == [floor]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Author"] in (ROOT / "LICENSE").read_text()
    paper, *code = metadata.get_all("Project-URL")
    assert paper == "Paper (Minhyung Cho and Jaehyung Lee), https://arxiv.org/abs/1709.09603"
    assert all(", https://github.com/MinhyungCho/riemannian-batch-normalization" in url for url in code)
    assert metadata.get_payload().startswith((ROOT / "README.md").read_text()[:100])
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == metadata["Version"]
