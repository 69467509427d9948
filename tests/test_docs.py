"""What documents name is there: files and folders of the repository, and pages that they link to."""

import re

import pytest

from harness.paths import REPO

PAGES = sorted((*REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("web/docs/*.md")))
FOLDERS = "accel|benchmarks|docs|examples|harness|locales|nodes|pocket|tests|web|workflows"
NAMED = re.compile(rf"`((?:{FOLDERS})/[\w./*-]*)`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_are_there(page):
    text = page.read_text(encoding="utf-8")
    missing = [name for name in NAMED.findall(text) if not list(REPO.glob(name.rstrip("/")))]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


def test_the_version_is_one():
    version = re.search(r'^version = "(.+)"', (REPO / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert f"\n## {version}" in (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    for workflow in (REPO / "example_workflows").glob("*.json"):
        found = re.findall(r'"cnr_id": "flux-hotswap",\s*"ver": "(.+?)"', workflow.read_text(encoding="utf-8"))
        assert set(found) == {version}, workflow.name
