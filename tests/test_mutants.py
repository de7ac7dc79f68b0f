"""tools/mutants.py: its list fits the code as it is, and its runner tells a mutant that is noticed from one that is not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import mutants
import pytest
from launching import ROOT
from mutants import MUTANTS, Mutant, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_still_applies_and_its_tests_are_there(mutant: Mutant) -> None:
    """Where this fails, give the mutant the text that stands there now, or take it out with the code that it broke."""
    assert mutated(mutant, ROOT) != (ROOT / mutant.file).read_text(encoding="utf-8")
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name or 'test_'}", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), test


def test_there_are_many_and_each_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mutant:
    """A tiny repository, and a mutant of it that its test notices."""
    root = tmp_path / "root"
    (root / "tests").mkdir(parents=True)
    (root / "half.py").write_text("def half(n):\n    return n / 2\n")
    (root / "tests" / "test_half.py").write_text("from half import half\n\n\ndef test_half():\n    assert half(4) == 2\n")
    monkeypatch.setattr(mutants, "ROOT", root)
    return Mutant("third", "a third", "half.py", "n / 2", "n / 3", ("tests/test_half.py",))


def test_the_runner_tells_what_is_noticed_from_what_is_not(repository: Mutant, capsys: pytest.CaptureFixture[str]) -> None:
    unnoticed = dataclasses.replace(repository, name="whole division", new="n // 2")
    broken = dataclasses.replace(repository, name="no Python", new="n /")
    stale = dataclasses.replace(repository, name="elsewhere", old="n / 5")
    assert mutants.run([repository, unnoticed, broken, stale], 100.0) == 3
    said = capsys.readouterr().out
    assert "killed   third" in said
    assert "test_half.py::test_half" in said
    assert "SURVIVED whole division" in said
    assert "SURVIVED no Python" in said  # what cannot be imported says nothing of the tests
    assert re.search("SURVIVED elsewhere .* the old text is 0 times in half.py", said)
    assert said.endswith("1 of 4 mutants killed\n")
    assert (mutants.ROOT / "half.py").read_text() == "def half(n):\n    return n / 2\n"


def test_tests_that_fail_anyway_kill_nothing(repository: Mutant, capsys: pytest.CaptureFixture[str]) -> None:
    (mutants.ROOT / "tests" / "test_half.py").write_text("def test_half():\n    assert False\n")
    assert mutants.run([repository], 100.0) == 1
    assert "SURVIVED third" in capsys.readouterr().out


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        mutants.main(["--only", "nothing"])
    assert left.value.code == 2
    assert "unknown mutant nothing" in capsys.readouterr().err
