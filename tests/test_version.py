"""The version stands in one place, which the package's metadata read."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib

from click.testing import CliRunner
from conftest import ROOT

import attrdb
from attrdb.cli import main

# As an installer asks a build backend, in a process that cannot import what attrdb needs.
METADATA = """
import sys
for name in ("click", "lance", "pyarrow", "duckdb", "numpy", "torch"):
    sys.modules[name] = None
from setuptools import build_meta
print(build_meta.prepare_metadata_for_build_wheel(sys.argv[1]))
"""


def test_the_metadata_have_the_version_of_the_code(tmp_path):
    checkout = tmp_path / "checkout"
    for name in ("attrdb", "ingest", "training", "queries"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("assets", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, checkout)
    code = checkout / "attrdb" / "__init__.py"
    text = code.read_text(encoding="utf-8")
    code.write_text(text.replace(f'__version__ = "{attrdb.__version__}"', '__version__ = "7.8.9"'), encoding="utf-8")
    ask = [sys.executable, "-c", METADATA, str(tmp_path)]
    done = subprocess.run(ask, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [metadata] = tmp_path.glob("*.dist-info/METADATA")
    assert "\nVersion: 7.8.9\n" in metadata.read_text(encoding="utf-8")


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc|\.dev)\d+)?", attrdb.__version__)
    assert CliRunner().invoke(main, ["--version"]).output == f"attrdb, version {attrdb.__version__}\n"


def test_the_changelog_has_the_version():
    heads = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heads[0] == attrdb.__version__
