"""`pip install .` offers the optimizer's module and nothing else, and says whose and what it is."""

import email
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that pip builds from a clone."""
    source = tmp_path_factory.mktemp("package") / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *(path.name for path in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", source.parent, source], check=True)
    (file,) = source.parent.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        yield archive


def test_the_wheel_holds_just_the_module(wheel):
    assert [name for name in wheel.namelist() if ".dist-info/" not in name] == ["grassmann_optimizer.py"]


def test_the_metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata.get_all("Requires-Dist") == ["torch>=2.8"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Author"] in (ROOT / "LICENSE").read_text()
    (url,) = metadata.get_all("Project-URL")
    for author in ("Minhyung Cho", "Jaehyung Lee"):
        assert author in url
    assert url.endswith(", https://arxiv.org/abs/1709.09603")
    assert metadata.get_payload().startswith((ROOT / "README.md").read_text()[:100])
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == metadata["Version"]
