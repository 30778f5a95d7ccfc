"""`pip install .` offers the optimizer's module and nothing else, and says whose and what it is."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

from helpers import ROOT

BUILD = """if True:
    import sys
    sys.modules["torch"] = None  # which is not needed to build
    from setuptools import build_meta
    build_meta.build_wheel("."), build_meta.build_sdist(".")
"""


def test_the_wheel_and_the_source_archive_hold_just_the_module_and_the_metadata(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", *map(str, ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_some.py").touch()
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, check=True)
    with (
        zipfile.ZipFile(*tmp_path.glob("*.whl")) as wheel,
        tarfile.open(*tmp_path.glob("*.tar.gz")) as archive,
    ):
        built = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert built == ["grassmann_optimizer.py"]
        built = [name.split("/", 1)[1] for name in archive.getnames() if name.endswith(".py")]
        assert built == ["grassmann_optimizer.py"]
        (metadata,) = (wheel.read(name) for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = email.message_from_bytes(metadata)
    floor = re.search(r"^torch>=.*$", (ROOT / "requirements.txt").read_text(), re.M)[0]
    assert metadata.get_all("Requires-Dist") == [floor]
    assert (metadata["Requires-Python"], metadata["License-Expression"]) == (">=3.11", "MIT")
    assert metadata["Author"] in (ROOT / "LICENSE").read_text()
    assert "https://arxiv.org/abs/1709.09603" in metadata["Project-URL"]
    assert metadata.get_payload().startswith((ROOT / "README.md").read_text()[:100])
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == metadata["Version"]
