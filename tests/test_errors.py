"""Messages: files named in a way that leads to them, and what the machine refuses in one line."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from launching import ROOT

from trainer import errors
from trainer.errors import BAD_INPUT, CHECKPOINT, OUT_OF_MEMORY, UserError, path_of, user_error
from trainer.main import report_error
from trainer.reporting.console import Console

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


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (RuntimeError("can't start new thread"), OUT_OF_MEMORY, "ulimit"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), OUT_OF_MEMORY, "ulimit"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), OUT_OF_MEMORY, "ulimit"),
        (OSError(errno.EMFILE, "Too many open files", "/a/b"), OUT_OF_MEMORY, "/a/b"),
        (MemoryError(), OUT_OF_MEMORY, "MemoryError"),
        (ImportError("libtorch.so: failed to map segment from shared object"), OUT_OF_MEMORY, "libtorch.so"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), CHECKPOINT, "/a/b: Permission denied"),
        (OSError(errno.EIO, "Input/output error", "/a/b"), CHECKPOINT, "/a/b: Input/output error"),
        (KeyError("getpwuid(): uid not found: 12345"), BAD_INPUT, "HOME"),
        (RuntimeError("Could not determine home directory."), BAD_INPUT, "HOME"),
    ],
)
def test_what_the_machine_refuses_is_no_bug(error: Exception, code: int, part: str, capsys: pytest.CaptureFixture) -> None:
    assert report_error(error, Console(None, is_main=True)) == code
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert part in shown
    assert shown.count("\n") == 1


def test_an_error_with_words_of_its_own_keeps_them() -> None:
    error = UserError("no folder for the cache (Could not determine home directory.); set SAMECURVE_CACHE to one")
    assert user_error(error) is error


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file", "/a"), KeyError("a"), OSError("odd")])
def test_a_bug_keeps_its_traceback(error: Exception, capsys: pytest.CaptureFixture) -> None:
    assert report_error(error, Console(None, is_main=True)) == 1
    assert type(error).__name__ in capsys.readouterr().err
