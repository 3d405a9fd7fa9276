"""The documentation site and the project's own files: navigation, links, workflow, versions in step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT, docs_script

needs_mkdocs = pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra docs")
MARKDOWN = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]


class Page(HTMLParser):
    """The links of a page, the files that it loads, and its anchors."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.loaded.append(values["src"])
        elif tag == "link" and values.get("rel") != "canonical":
            self.loaded.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as `make docs-site` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}


@needs_mkdocs
def test_every_link_of_the_site_leads_somewhere(site):
    pages = {name: Page(path.read_text(encoding="utf-8")) for name, path in site.items() if name.suffix == ".html"}
    pages.pop(Path("404.html"))  # its addresses begin at the root of a server
    assert len(pages) > 20
    for name, page in pages.items():
        for link in {*page.links, *page.loaded}:
            parts = urlsplit(link)
            if parts.scheme or link in (".", "#"):
                continue
            target = Path(os.path.normpath(name.parent / unquote(parts.path))) if parts.path else name
            assert target in site, (name, link)
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors | {"__codelineno"}, (name, link)


@needs_mkdocs
def test_the_site_loads_nothing_from_elsewhere(site):
    for name, path in site.items():
        if name.suffix == ".html":
            page = Page(path.read_text(encoding="utf-8"))
            assert page.loaded
            assert not [address for address in page.loaded if urlsplit(address).netloc], name
        if name.suffix == ".css":
            assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text(encoding="utf-8")), name


@needs_mkdocs
def test_files_of_the_project_are_in_the_site(site):
    """A page outside docs/ is a page; what it shows and other files that are linked are copied."""
    index = site[Path("index.html")].read_text(encoding="utf-8")
    assert 'href="sql.html"' in index
    assert 'href="benchmarks/results.html#attribution-on-iconabc"' in index
    assert Path("files/NOTICE.txt") in site
    assert Path("files/benchmarks/plots/gains.svg") in site
    assert not [name for name in site if name.suffix == ".py"]


@needs_mkdocs
def test_every_page_is_in_the_navigation_once():
    listed = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [path.name for path in (ROOT / "docs").glob("*.md")] + list(docs_script("site").PAGES.values())
    assert sorted(listed) == sorted(pages)


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_work_on_a_code_host(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not urlsplit(link).scheme:
            target = (path.parent / link).resolve()
            assert target.exists(), link
            assert target.is_relative_to(ROOT), link


def test_the_workflow_covers_what_the_package_claims():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    [pythons] = re.findall(r"python: \[(.*)\]", workflow)
    [duckdbs] = re.findall(r"duckdb: \[(.*)\]", workflow)
    assert project["requires-python"] == ">=" + re.findall(r"[\d.]+", pythons)[0]
    [lowest] = [line for line in project["dependencies"] if line.startswith("duckdb")]
    assert lowest.startswith("duckdb>=" + re.findall(r"\d+\.\d+", duckdbs)[0])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"run: make ([\w-]+)", workflow):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)


def test_hooks_run_pinned_versions():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"language: (\w+)", hooks)) == {"system"}
    assert all(entry.startswith(".venv/bin/") for entry in re.findall(r"entry: (\S+)", hooks))
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for package in ("ruff", "pre_commit", "pre_commit_hooks", "mkdocs-material", "coverage"):
        assert re.search(rf"^{package}==", pinned, re.MULTILINE)


@pytest.mark.skipif(find_spec("yaml") is None, reason="needs PyYAML")
@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_forms_and_workflows_are_yaml(path):
    import yaml

    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent.name == "ISSUE_TEMPLATE" and path.name != "config.yml":
        assert {"name", "description", "body"} <= found.keys()
        fields = [field for field in found["body"] if field["type"] != "markdown"]
        assert all(field["attributes"]["label"] for field in fields)
        assert len({field["id"] for field in fields}) == len(fields)
