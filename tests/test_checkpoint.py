"""Nothing half-written is ever loaded, no good checkpoint is lost, and loading data runs no code."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from launching import RECIPE, ROOT, environment
from small_checkpoints import trainer_state
from torch import nn

from recipes.gpt2_wikitext import Gpt2Wikitext
from trainer.backends.plain import PlainBackend
from trainer.backends.tensors import TensorEntry
from trainer.checkpoints import checkpoint, retention, writing
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.command_line import config as configuration
from trainer.command_line.sections import Optimisation
from trainer.distributed.launch import connect
from trainer.errors import CHECKPOINT, UserError
from trainer.main import train
from trainer.recipe import Report
from trainer.reporting.console import Console

PREFIX = "checkpoint_step_"


def entries(**tensors: torch.Tensor) -> list[TensorEntry]:
    return [TensorEntry(name, tuple(t.shape), t.dtype, lambda _, t=t: t) for name, t in tensors.items()]


def write(folder: Path, step: int, shard_bytes: int = writing.SHARD_BYTES, **tensors: torch.Tensor) -> Path:
    """A small checkpoint whose content follows from its step."""
    tensors = tensors or {name: torch.full((5, 3), float(step)) for name in ("a.weight", "b.weight")}
    documents = {"trainer_state.json": trainer_state(step), "config.yaml": f"step: {step}\n"}
    both = {"model": entries(**tensors), "optimizer": entries(step=torch.tensor(float(step)))}
    return writing.write(folder, f"{PREFIX}{step}", both, documents, shard_bytes)


def read_verified(path: Path) -> Checkpoint:
    saved = Checkpoint(path)
    saved.verify()
    return saved


def newest_good(folder: Path, prefix: str, log: Callable[[str], None]) -> Checkpoint | None:
    return retention.newest_good(folder, prefix, read_verified, log)


def flip(path: Path, position: int = -3, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


def rewrite_manifest(folder: Path, **changes: object) -> None:
    """A manifest that matches every file, as an attacker would write it."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != "manifest.json":
            files[path.name] = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"format": checkpoint.FORMAT, "files": files, **changes}))


def error_of(action: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        action()
    assert caught.value.exit_code == CHECKPOINT
    return caught.value


# Round trips


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(4, 3), "one": torch.randn(1), "scalar": torch.tensor(2.0), "count": torch.tensor([1, 2])}
    loaded = Checkpoint(write(tmp_path, 4, **tensors))
    loaded.verify()
    assert loaded.names("model") == set(tensors)
    for name, tensor in tensors.items():
        assert loaded.tensor("model", name).equal(tensor)
        assert loaded.tensor("model", name).dtype == tensor.dtype
        assert loaded.form("model", name) == (tuple(tensor.shape), tensor.dtype)
    assert loaded.train_state.step == 4
    assert loaded.text("config.yaml") == "step: 4\n"
    assert not list(tmp_path.glob(".unfinished-*"))


def test_shards_past_a_size_with_an_index(tmp_path: Path) -> None:
    tensors = {f"layer{i}": torch.randn(10, 10) for i in range(7)} | {"large": torch.randn(50, 50)}
    path = write(tmp_path, 1, shard_bytes=1000, **tensors)
    shards = sorted(p.name for p in path.glob("model-*.safetensors"))
    assert shards == [f"model-{n:05d}-of-00005.safetensors" for n in range(1, 6)]  # 2 + 2 + 2 + 1, and the large one alone
    assert not (path / "model.safetensors").exists()
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    loaded = Checkpoint(path)
    loaded.verify()
    assert all(loaded.tensor("model", name).equal(tensor) for name, tensor in tensors.items())
    flip(path / shards[2])
    assert shards[2] in str(error_of(Checkpoint(path).verify))


def test_shared_and_tied_tensors_are_written(tmp_path: Path) -> None:
    """safetensors refuses tensors that share memory; a model may hold them all the same."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.output = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.output.weight = self.embedding.weight
            storage = torch.arange(12.0)
            self.first, self.second = nn.Parameter(storage[:8].view(2, 4)), nn.Parameter(storage[4:].view(4, 2).t())
            self.register_buffer("table", storage[:3])
            self.register_buffer("forgotten", storage[:2], persistent=False)

    network = Tied()
    backend = PlainBackend(connect("cpu", 1), "no", "no", Optimisation())
    backend.prepare(network, network, lambda: torch.optim.AdamW(network.parameters()))
    both = {"model": backend.model_tensors(), "optimizer": backend.optimizer_tensors()}
    loaded = Checkpoint(writing.write(tmp_path, f"{PREFIX}1", both, {}))
    assert loaded.names("model") == {"embedding.weight", "first", "second", "table"}  # the tied weight once
    assert loaded.tensor("model", "first").equal(network.first)
    assert loaded.tensor("model", "second").equal(network.second)
    assert loaded.tensor("model", "table").equal(network.table)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path = write(tmp_path, 1)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert len(modes) == 5
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask


# Damage


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1)


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights-truncated": (truncate("model.safetensors"), "model.safetensors"),
    "weights-byte": (lambda folder: flip(folder / "model.safetensors"), "model.safetensors"),
    "weights-header-byte": (lambda folder: flip(folder / "model.safetensors", 20), "model.safetensors"),
    "weights-missing": (remove("model.safetensors"), "model.safetensors"),
    "weights-empty": (lambda folder: os.truncate(folder / "model.safetensors", 0), "model.safetensors"),
    "weights-are-a-folder": (
        lambda folder: (remove("model.safetensors")(folder), (folder / "model.safetensors").mkdir()),
        "model.safetensors",
    ),
    "moments-byte": (lambda folder: flip(folder / "optimizer.safetensors"), "optimizer.safetensors"),
    "state-byte": (lambda folder: flip(folder / "trainer_state.json"), "trainer_state.json"),
    "state-missing": (remove("trainer_state.json"), "trainer_state.json"),
    "config-truncated": (truncate("config.yaml"), "config.yaml"),
    "manifest-missing": (remove("manifest.json"), "manifest.json"),
    "manifest-truncated": (truncate("manifest.json"), "manifest.json"),
    "manifest-not-json": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\x00"), "manifest.json"),
    "manifest-of-another-form": (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json"),
    "empty-folder": (empty_folder, "manifest.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_message(tmp_path: Path, name: str) -> None:
    damage, file = DAMAGE[name]
    for step in (4, 8, 12):
        write(tmp_path, step)
    damage(tmp_path / f"{PREFIX}12")
    messages: list[str] = []
    loaded = newest_good(tmp_path, PREFIX, messages.append)
    assert loaded is not None
    assert loaded.path.name == f"{PREFIX}8"
    assert len(messages) == 1
    assert "WARNING" in messages[0]
    assert f"{PREFIX}12" in messages[0]
    assert file in messages[0]
    assert (tmp_path / f"{PREFIX}12").is_dir()  # nothing is deleted: the user may still recover something


@pytest.mark.parametrize("name", DAMAGE)
def test_none_good_is_refused_not_started_anew(tmp_path: Path, name: str) -> None:
    write(tmp_path, 4)
    DAMAGE[name][0](tmp_path / f"{PREFIX}4")
    error = error_of(lambda: newest_good(tmp_path, PREFIX, lambda _: None))
    assert "none of the 1 checkpoints" in str(error)
    assert str(tmp_path) in str(error)


def test_every_byte_of_a_manifest_may_flip(tmp_path: Path) -> None:
    """Refused, or harmless; never a traceback, which `auto` would not survive."""
    path = write(tmp_path, 4)
    good = (path / "manifest.json").read_bytes()
    codes = []
    for position in range(len(good)):
        flip(path / "manifest.json", position, bit=2)
        try:
            Checkpoint(path).verify()
        except UserError as error:
            codes.append(error.exit_code)
        (path / "manifest.json").write_bytes(good)
    assert set(codes) == {CHECKPOINT}
    assert len(codes) > len(good) / 2  # the rest is white space


def test_half_written_folders_do_not_count_and_are_cleared(tmp_path: Path) -> None:
    write(tmp_path, 4)
    shutil.copytree(tmp_path / f"{PREFIX}4", tmp_path / f".unfinished-{PREFIX}8")
    messages: list[str] = []
    loaded = newest_good(tmp_path, PREFIX, messages.append)
    assert loaded is not None
    assert (loaded.path.name, messages) == (f"{PREFIX}4", [])
    outside = tmp_path / "outside"
    (outside / "precious").mkdir(parents=True)
    (tmp_path / ".unfinished-link").symlink_to(outside)
    retention.clear_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{PREFIX}4", "outside"]
    assert (outside / "precious").is_dir()


def test_links_and_other_names_are_no_step_checkpoints(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (tmp_path / f"{PREFIX}99").symlink_to(f"{PREFIX}4")
    (tmp_path / f"{PREFIX}98").write_text("a file")
    for name in (f"{PREFIX}9x", f"old_{PREFIX}9", f"{PREFIX}-9", "rolled_back_1"):
        (tmp_path / name).mkdir()
    assert retention.step_folders(tmp_path, PREFIX) == [(4, tmp_path / f"{PREFIX}4")]


def test_another_format_is_refused_with_both_versions(tmp_path: Path) -> None:
    path = write(tmp_path, 4)
    for newer in (checkpoint.FORMAT + 1, checkpoint.FORMAT + 6, checkpoint.FORMAT - 1):
        rewrite_manifest(path, format=newer)
        error = error_of(lambda: Checkpoint(path))
        assert f"format {newer}" in str(error)
        assert f"reads {checkpoint.FORMAT};" in str(error)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "a/../../outside.json", "..", ".", "", "sub/file"])
def test_a_manifest_that_points_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 4)
    (tmp_path / "outside.json").write_text("{}")
    (path / "sub").mkdir()
    (path / "sub" / "file").write_text("{}")
    described = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    files = json.loads((path / "manifest.json").read_text())["files"]
    rewrite_manifest(path, files={**files, name: described})
    error_of(lambda: Checkpoint(path).verify())


@pytest.mark.parametrize("target", ["../model.safetensors", "absolute", "not-in-the-manifest.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, target: str) -> None:
    path = write(tmp_path, 4, shard_bytes=1)
    elsewhere = write(tmp_path / "elsewhere", 4)
    shutil.copy(elsewhere / "model.safetensors", tmp_path / "model.safetensors")
    target = str(tmp_path / "model.safetensors") if target == "absolute" else target
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], target)
    file.write_text(json.dumps(index))
    rewrite_manifest(path)
    loaded = Checkpoint(path)
    loaded.verify()  # every hash is right
    assert target in str(error_of(lambda: loaded.names("model")))


# No code in data


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.marker,))


def pickles(marker: Path) -> list[bytes]:
    """The same bomb as a plain pickle, and as torch saves it in both of its forms."""
    contents = [pickle.dumps(Bomb(marker))]
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save({"weight": Bomb(marker)}, buffer, _use_new_zipfile_serialization=zipped)
        contents.append(buffer.getvalue())
    return contents


def test_the_bombs_go_off_when_they_are_opened(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for content in pickles(marker):
        with contextlib.suppress(Exception):
            pickle.loads(content)
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(io.BytesIO(content), weights_only=False)
        assert marker.exists()
        marker.unlink()


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json"])
def test_a_pickle_renamed_to_a_file_of_a_checkpoint_is_never_opened(tmp_path: Path, file: str, kind: int) -> None:
    marker, path = tmp_path / "marker", write(tmp_path, 4)
    (path / file).write_bytes(pickles(marker)[kind])
    if file != "manifest.json":
        rewrite_manifest(path)

    def read_all() -> None:
        loaded = Checkpoint(path)
        loaded.verify()
        assert isinstance(loaded.state, dict)
        for stem in ("model", "optimizer"):
            for name in loaded.names(stem):
                loaded.tensor(stem, name)

    assert file in str(error_of(read_all))
    assert not marker.exists()


def test_no_source_reads_or_writes_pickles() -> None:
    sources = [p for folder in ("trainer", "recipes", "tools") for p in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 20
    forbidden = re.compile(
        r"torch\.(load|save)\b|\b(c?pickle|dill|cloudpickle|joblib|marshal|shelve)\b(?!d|r)|allow_pickle\s*=\s*True"
        r"|from torch(\.serialization)? import .*\b(load|save)\b|yaml\.(unsafe_|full_)load|save_state\(|load_state\("
    )
    violations = []
    for path in sources:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            code = re.sub(r'"[^"]*"', '""', line).partition("#")[0]
            if forbidden.search(code) and not re.search(r"[Pp]ickl(e|ing) .*(is|one|a) ", line):  # prose of a docstring
                violations.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert violations == []
    pattern = "import pickle", "torch.load(path)", "from torch import load", "np.load(f, allow_pickle=True)"
    assert all(forbidden.search(line) for line in pattern)  # the pattern does match such code


# A save that fails, or is killed


@pytest.mark.parametrize("keep_last", [1, 2])
def test_killed_at_every_file_operation_of_a_save(tmp_path: Path, keep_last: int) -> None:
    """SIGKILL before each file operation, one after the other: there is always a good newest checkpoint, old or new."""
    template, folder = tmp_path / "template", tmp_path / "checkpoints"
    retention.link(template, "best_model", write(template, 4).name)
    write(template, 8)
    names = ("open", "os.", "shutil.", "pathlib.")

    def save() -> None:
        write(folder, 12)
        retention.link(folder, "best_model", f"{PREFIX}12")
        retention.prune(folder, PREFIX, keep_last)

    killed, seen = 0, set()
    for number in range(1, 200):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder, symlinks=True)
        child = os.fork()
        if not child:
            count = 0

            def kill_at(event: str, _: tuple[object, ...], number: int = number) -> None:
                nonlocal count
                count += event.startswith(names)
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(kill_at)
            try:
                save()
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        messages: list[str] = []
        loaded = newest_good(folder, PREFIX, messages.append)
        assert loaded is not None
        assert messages == [], "a half-written folder passes for a checkpoint"
        assert loaded.train_state.step in (8, 12)
        assert Checkpoint(folder / "best_model").train_state.step in (4, 12)
        assert float(loaded.tensor("model", "a.weight")[0, 0]) == loaded.train_state.step
        seen.add(loaded.train_state.step)
        retention.clear_unfinished(folder)  # and the next launch can save again
        if not os.WIFSIGNALED(status):
            break
        killed += 1
    assert killed > 15
    assert seen == {8, 12}
    expected = {12} if keep_last == 1 else {8, 12}  # the last child lived to the end
    assert {step for step, _ in retention.step_folders(folder, PREFIX)} == expected


def test_a_file_too_large_removes_what_was_begun(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a full disk where nothing can be mounted."""
    write(tmp_path, 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        error = error_of(lambda: write(tmp_path, 8, w=torch.zeros(100, 100)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{PREFIX}8" in str(error)
    assert "could not be written" in str(error)
    assert [p.name for p in tmp_path.iterdir()] == [f"{PREFIX}4"]
    Checkpoint(tmp_path / f"{PREFIX}4").verify()
    write(tmp_path, 8, w=torch.zeros(100, 100))


# Pruning and rolling back


def steps(folder: Path) -> list[int]:
    return [step for step, _ in retention.step_folders(folder, PREFIX)]


def test_prune_keeps_the_newest_and_what_links_point_to(tmp_path: Path) -> None:
    for step in (4, 8, 12, 16, 20, 100):
        write(tmp_path, step)
    retention.link(tmp_path, "best_model", f"{PREFIX}4")
    retention.link(tmp_path, "checkpoint_epoch_1", f"{PREFIX}12")
    retention.prune(tmp_path, PREFIX, 0)
    assert steps(tmp_path) == [100, 20, 16, 12, 8, 4]
    retention.prune(tmp_path, PREFIX, 3)
    assert steps(tmp_path) == [100, 20, 16, 12, 4]
    retention.prune(tmp_path, PREFIX, 1)
    assert steps(tmp_path) == [100, 12, 4]
    retention.link(tmp_path, "best_model", f"{PREFIX}100")
    retention.prune(tmp_path, PREFIX, 1)
    assert steps(tmp_path) == [100, 12]
    assert not list(tmp_path.glob(".unfinished-*"))


def test_prune_never_deletes_through_a_link_nor_what_is_not_ours(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    precious = write(elsewhere, 1)
    for step in (4, 8):
        write(folder, step)
    (folder / f"{PREFIX}2").symlink_to(precious)  # a link by the name of a step
    (folder / f"{PREFIX}4" / "link").symlink_to(elsewhere)  # and one inside a folder that goes
    (folder / "my_notes").mkdir()
    retention.prune(folder, PREFIX, 1)
    assert steps(folder) == [8]
    assert (folder / f"{PREFIX}2").is_symlink()
    assert (folder / "my_notes").is_dir()
    Checkpoint(precious).verify()


def test_a_link_is_relative_and_replaced(tmp_path: Path) -> None:
    for step in (4, 8):
        retention.link(tmp_path, "best_model", write(tmp_path, step).name)
    assert os.readlink(tmp_path / "best_model") == f"{PREFIX}8"
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert Checkpoint(moved / "best_model").train_state.step == 8


def test_roll_back_sets_later_checkpoints_aside(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        write(tmp_path, step)
    retention.link(tmp_path, "best_model", f"{PREFIX}12")
    retention.link(tmp_path, "checkpoint_epoch_1", f"{PREFIX}4")
    assert retention.roll_back(tmp_path, PREFIX, 4) == [str(tmp_path / "rolled_back_1" / f"{PREFIX}{step}") for step in (12, 8)]
    assert steps(tmp_path) == [4]
    assert retention.links(tmp_path) == {"checkpoint_epoch_1": f"{PREFIX}4"}
    assert Checkpoint(tmp_path / "rolled_back_1" / "best_model").train_state.step == 12
    assert retention.roll_back(tmp_path, PREFIX, 4) == []
    write(tmp_path, 8)
    retention.roll_back(tmp_path, PREFIX, 4)
    assert sorted(p.name for p in (tmp_path / "rolled_back_2").iterdir()) == [f"{PREFIX}8"]


# A run directory


TINY = "--tokenizer train --vocab_size 300 --d_model 16 --num_layers 1 --num_heads 2 --max_length 32 --batch_size 4"
TINY += " --max_steps 12 --save_every 4 --eval_every 0 --log_every 2 --num_workers 0 --no_use_tensorboard --device cpu"


class Quiet(Gpt2Wikitext):
    report_class = Report


def launch(*flags: str) -> str:
    """One launch in this process; its output. Raises its UserError."""
    recipe, output = Quiet(), io.StringIO()
    with contextlib.redirect_stdout(output):
        parsed = configuration.parse(recipe.config_class, recipe.presets, flags, recipe.name)
        train(recipe, parsed, flags, connect("cpu", 1), Console(None, True))
    return output.getvalue()


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The flags of a tiny run on a text written here, all but its directory."""
    folder = tmp_path_factory.mktemp("text")
    speech = "now is the winter of our discontent made glorious summer by this sun and all clouds that loured"
    for name, rows in (("train", 150), ("validation", 8), ("test", 8)):
        lines = (" ".join(speech.split()[(i * i + 3 * k) % 18] for k in range(12)) for i in range(rows))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMECURVE_CACHE", str(folder / "cache"))
        yield [*TINY.split(), "--data_dir", str(folder)]


@pytest.fixture(scope="module")
def original(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("original") / "run"
    launch(*flags, "--output_dir", str(run))
    assert steps(run / "checkpoints") == [12, 8, 4]
    return run


@pytest.fixture
def run_directory(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run", symlinks=True))


@pytest.mark.parametrize("name", ["weights-byte", "manifest-missing", "empty-folder"])
def test_auto_takes_the_newest_good_one_and_goes_on_to_the_same_end(
    flags: list[str], run_directory: Path, original: Path, name: str
) -> None:
    folder = run_directory / "checkpoints"
    DAMAGE[name][0](folder / f"{PREFIX}12")
    flip(folder / f"{PREFIX}8" / "optimizer.safetensors")
    shutil.copytree(folder / f"{PREFIX}4", folder / f".unfinished-{PREFIX}12")
    output = launch(*flags, "--output_dir", str(run_directory))
    assert output.count("WARNING: skipping a damaged checkpoint") == 2
    assert "Resumed from step 4" in output
    assert steps(folder) == [12, 8, 4]
    old, new = Checkpoint(original / "checkpoints" / f"{PREFIX}12"), Checkpoint(folder / f"{PREFIX}12")
    new.verify()
    assert all(new.tensor("model", n).equal(old.tensor("model", n)) for n in old.names("model"))
    assert Checkpoint(folder / "checkpoint_final").digest == new.digest
    assert (folder / "rolled_back_1" / f"{PREFIX}12").is_dir()  # what was damaged is kept
    assert "WARNING" in (run_directory / "train.log").read_text()


@pytest.mark.parametrize("name", DAMAGE)
def test_an_explicit_checkpoint_that_is_damaged_is_refused(flags: list[str], run_directory: Path, name: str) -> None:
    damage, file = DAMAGE[name]
    path = run_directory / "checkpoints" / f"{PREFIX}8"
    damage(path)
    error = error_of(lambda: launch(*flags, "--output_dir", str(run_directory), "--resume_from", str(path)))
    assert file in str(error)
    assert str(path) in str(error)
    assert steps(run_directory / "checkpoints") == [12, 8, 4]  # nothing was rolled back


def test_a_run_without_a_good_checkpoint_is_refused(flags: list[str], run_directory: Path) -> None:
    for step in (4, 8, 12):
        flip(run_directory / "checkpoints" / f"{PREFIX}{step}" / "model.safetensors")
    before = (run_directory / "metrics.jsonl").read_bytes()
    error = error_of(lambda: launch(*flags, "--output_dir", str(run_directory)))
    assert "none of the 3 checkpoints" in str(error)
    assert (run_directory / "metrics.jsonl").read_bytes() == before


def test_pickles_beside_and_in_a_checkpoint_are_never_opened(flags: list[str], run_directory: Path, tmp_path: Path) -> None:
    marker, folder = tmp_path / "marker", run_directory / "checkpoints"
    (folder / "checkpoint_final").unlink()
    shutil.rmtree(folder / f"{PREFIX}12")
    for content, name in zip(pickles(marker), ("pytorch_model.bin", "optimizer.bin", "random_states_0.pkl"), strict=True):
        for place in (run_directory, folder, folder / f"{PREFIX}8", folder / f"{PREFIX}4"):
            (place / name).write_bytes(content)
            (place / "checkpoint_step_4.pt").write_bytes(content)
    output = launch(*flags, "--output_dir", str(run_directory))
    assert "Resumed from step 8" in output
    output = launch(*flags, "--output_dir", str(run_directory), "--resume_from", f"{PREFIX}4.pt")
    assert "Resumed from step 4" in output
    assert not marker.exists()


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_init_from_opens_no_pickle(flags: list[str], run_directory: Path, tmp_path: Path, kind: int) -> None:
    """A folder of transformers' may hold its weights as a pickle; so may a checkpoint that lost its manifest."""
    marker, path = tmp_path / "marker", run_directory / "checkpoints" / f"{PREFIX}8"
    for name in ("manifest.json", "model.safetensors"):
        (path / name).unlink()
    (path / "pytorch_model.bin").write_bytes(pickles(marker)[kind])
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "open" and "pytorch_model.bin" in str(arguments[0]):
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    try:
        with pytest.raises(UserError):
            launch(*flags, "--output_dir", str(tmp_path / "new"), "--init_from", str(path), "--max_steps", "1")
    finally:
        watching = False
    assert not marker.exists()
    assert opened == []


# A full disk


def test_a_full_disk(flags: list[str], tmp_path: Path) -> None:
    """Training continues with warnings, the good checkpoint stays, nothing half-written stays, and the last save ends it: 5."""
    disk, kept, run = tmp_path / "disk", tmp_path / "kept", tmp_path / "run"
    disk.mkdir()
    argv = [*flags, "--output_dir", str(run), "--checkpoint_dir", str(disk), "--keep_last", "0", "--save_every", "2"]
    command = [sys.executable, str(RECIPE), *argv]
    mount, limit, fits = f"mount -t tmpfs -o size=220k tmpfs {disk}", None, [2]
    if _may("unshare", "-rm", "sh", "-c", mount):  # a tmpfs with room for one checkpoint, in a name space of its own
        command = ["unshare", "-rm", "sh", "-c", f'{mount} && "$@"; code=$?; cp -r {disk} {kept}; exit $code', "sh", *command]
    else:  # no mounts here: a limit on the size of any file, which no checkpoint meets

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        kept, fits = disk, []
    ran = subprocess.run(
        command,
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit,
        stdin=subprocess.DEVNULL,
    )
    assert ran.returncode == CHECKPOINT, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout.count("WARNING: checkpoint") == 5 - len(fits)  # steps 2 (or 4) to 10
    first = "that of step 2 stays" if fits else "this run has no checkpoint yet"
    assert f"make room, or give the right to write there. Training goes on; {first}" in ran.stdout
    assert "Step     12" in ran.stdout
    assert f"{PREFIX}12 could not be written" in ran.stderr
    assert steps(kept) == fits
    assert sorted(p.name for p in kept.iterdir() if p.name != ".lock") == [f"{PREFIX}{step}" for step in fits]
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 12)
    assert status["checkpoint"] == (str(disk / f"{PREFIX}{fits[-1]}") if fits else None)
    for step in fits:
        Checkpoint(kept / f"{PREFIX}{step}").verify()
        # With some space again the same run goes on from there.
        shutil.copytree(kept, disk, dirs_exist_ok=True)
        assert f"Resumed from step {step}" in launch(*argv)
        assert (disk / "checkpoint_final").is_dir()


def _may(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0
