"""`pip install .` offers the optimizer's module and nothing else, and says whose and what it is."""

import email
import re
import shutil
import subprocess
import sys
import zipfile

from helpers import ROOT

import grassmann_optimizer as go


def test_the_wheel_holds_just_the_module_and_says_what_it_is(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *(path.name for path in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", tmp_path, source], check=True)
    (file,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as wheel:
        names = wheel.namelist()
        metadata = email.message_from_bytes(wheel.read(next(n for n in names if n.endswith("METADATA"))))
    assert [name for name in names if ".dist-info/" not in name] == ["grassmann_optimizer.py"]
    assert any(need.startswith("torch>=") for need in metadata.get_all("Requires-Dist"))
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Author"] in (ROOT / "LICENSE").read_text()
    (paper,) = (url for url in metadata.get_all("Project-URL") if url.startswith("Paper"))
    for word in ("Minhyung Cho", "Jaehyung Lee", "https://arxiv.org/abs/1709.09603"):
        assert word in paper
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == metadata["Version"] == go.__version__
