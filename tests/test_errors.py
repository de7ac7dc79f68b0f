"""A message names a file of the repository in a way that leads to it, from any working directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import ROOT

from trainer import errors
from trainer.errors import path_of

NAME = "accelerate_configs/ddp.yaml"


def test_in_the_repositorys_root_a_name_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert path_of(NAME) == NAME


def test_elsewhere_an_editable_install_leads_to_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_of(NAME) == str(ROOT / NAME)


def test_the_working_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).parent.mkdir()
    (tmp_path / NAME).touch()
    monkeypatch.chdir(tmp_path)
    assert path_of(NAME) == NAME


def test_a_package_without_the_file_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(errors, "REPOSITORY", tmp_path / "site-packages")
    assert path_of(NAME) == f"{NAME} in samecurve's source repository"
