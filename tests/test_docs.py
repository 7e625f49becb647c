"""The tutorial and the README's ten lines run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["docs/tutorial.md", "README.md"])
def test_the_page_runs_as_it_stands(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = blocks(page)
    assert code
    names: dict[str, object] = {}
    for block in code:
        exec(compile(block, page, "exec"), names)
    assert capsys.readouterr().out
    assert (tmp_path / "run/coders/topk/coder.json").is_file()


@pytest.mark.parametrize(
    "page", sorted(p.name for p in (ROOT / "docs").glob("*.md")) + ["../README.md", "../CONTRIBUTING.md"]
)
def test_links_between_pages_lead_somewhere(page):
    path = (ROOT / "docs" / page).resolve()
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{page} links to {target}, which is not there"
