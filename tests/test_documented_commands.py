"""Every command of a recipe that a page shows is one that the recipe takes, and every import is there."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from launching import ROOT
from test_help import RECIPES
from test_links import PAGES

from trainer.main import read_command_line
from trainer.planning.flags import take_plan_flags

COMMAND = re.compile(r"\brecipes/(\w+)\.py([^`\n#|);&]*)")
NOT_HERE = ("...", "my_run.yaml")  # what the reader is to fill in, or to write
IMPORT = re.compile(r"`from ((?:recipes|trainer)[\w.]*) import (\w+)`")
BY_NAME = {recipe.name: recipe for recipe in RECIPES}


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    """(recipe, its arguments) of each command but those of tools; lines that go on with a backslash put together."""
    lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    text = "\n".join(line for line in lines if "tools/" not in line)
    found = [(name, arguments) for name, arguments in COMMAND.findall(text) if name in BY_NAME]
    return [(name, shlex.split(arguments)) for name, arguments in found if not any(part in arguments for part in NOT_HERE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_taken(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, argv in commands_of(page):
        if "--help" not in argv:
            read_command_line(BY_NAME[name], take_plan_flags(argv)[1])  # UserError for a command or flag that it has not


def test_every_import_of_the_guides_page_is_there() -> None:
    text = (ROOT / "docs" / "from_the_guides.md").read_text(encoding="utf-8")
    imports = IMPORT.findall(text)
    assert len(imports) == 3
    assert all(hasattr(importlib.import_module(module), name) for module, name in imports)


def test_the_pages_show_commands() -> None:
    assert len(commands_of(ROOT / "README.md")) >= 5
    assert len(commands_of(ROOT / "docs" / "from_the_guides.md")) >= 20
