"""Reading checkpoint folders: safetensors, JSON and YAML. No pickle is ever opened.

The manifest holds size and SHA-256 of every other file; a file that it does not name is never opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.checkpoints.pretrained import rows_in
from trainer.checkpoints.tensor_file import DTYPES
from trainer.errors import CHECKPOINT, UserError, one_line
from trainer.fields import is_a, problem_of, shown
from trainer.initial_weights import ALL_ROWS
from trainer.optimisation.averages import AVERAGE, COUNT
from trainer.state import TrainState

FORMAT = 2
MANIFEST = "manifest.json"
STATE, CONFIG = "trainer_state.json", "config.yaml"
STATE_HINTS = {
    "recipe": str,
    "train_state": dict[str, Any],
    "epoch": int,
    "only_best": bool,
    "processes": int,
    "loss_scale": dict[str, float],
    "optimizer": str,
    "parameters_without_state": list[str],
    "data_fingerprint": str,
    "versions": dict[str, str],
}
MOST_SCALE, MOST_GROWTH = 2.0**127, 2**31
"""bounds of a loss scale (fp32) and of its count of good steps (int32)"""
NEVER_NEGATIVE = ("exp_avg_sq.", "max_exp_avg_sq.")
"""prefixes of the names of second moments, of which the optimizer takes the square root"""
SCALE_HINTS = {"scale": float, "growth": int, "hysteresis": int}
TEMPORARY = ".unfinished-"
"""prefix of the name of a folder that is not yet, or no longer, a checkpoint"""
ENDINGS = r"\.(pth?|safetensors)$"
"""file name endings that are ignored in the path of a checkpoint, which is a folder here"""


def refuse_run_directory(folder: Path) -> None:
    """UserError for the folder of a run, where one of its checkpoints is meant."""
    if (folder / CONFIG).is_file() and (folder / "checkpoints").is_dir():
        raise UserError(
            f"{folder} is the directory of a run; give one of its checkpoints, in {folder / 'checkpoints'}", CHECKPOINT
        )


class Checkpoint:
    """A committed checkpoint folder. The constructor checks the form of the manifest, `verify` every byte."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = self._content(MANIFEST)
        manifest = self._json(MANIFEST, content)
        version: Any = manifest.get("format")
        if not is_a(int, version) or not isinstance(manifest.get("files"), dict):
            raise self.damaged(MANIFEST, "is not a manifest")
        if version != FORMAT:
            way_out = "update samecurve" if version > FORMAT else "use the version that wrote it"
            raise UserError(
                f"{path} has checkpoint format {shown(version)}, this version reads {FORMAT}; {way_out}", CHECKPOINT
            )
        self.files: dict[str, dict[str, Any]] = manifest["files"]
        for name, entry in self.files.items():
            if Path(name).name != name:
                raise self.damaged(MANIFEST, f"names {name!a:.200}, which is not a file in this folder")
            if not (isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)):
                raise self.damaged(MANIFEST, f"has no size and hash for {name!a:.200}")
        self.digest = hashlib.sha256(content).hexdigest()
        self._file_of: dict[str, dict[str, str]] = {}
        self._open: dict[str, Any] = {}

    def damaged(self, file: str, what: str) -> UserError:
        """The error to raise for a damaged file of this checkpoint; `what` is wrong with it."""
        return UserError(f"checkpoint {self.path}: {ascii(file)[1:-1]:.200} {what}; choose another checkpoint", CHECKPOINT)

    @contextlib.contextmanager
    def _reading(self, file: str) -> Iterator[Path]:
        """The path of a regular file (reading a pipe might never end); errors within the context become UserErrors."""
        path = self.path / file
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise self.damaged(file, "is not a regular file")
            yield path
        except FileNotFoundError:
            refuse_run_directory(self.path)
            raise self.damaged(file, "is missing") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "no such name can be"
            raise self.damaged(file, f"cannot be read ({reason})") from None

    def _content(self, file: str) -> bytes:
        with self._reading(file) as path:
            return path.read_bytes()

    def _json(self, file: str, content: bytes | None = None) -> dict[str, Any]:
        try:
            value = json.loads(self._content(file) if content is None else content)
        except (ValueError, RecursionError) as error:
            raise self.damaged(file, f"is not JSON ({one_line(error, 80)})") from None
        if not isinstance(value, dict):
            raise self.damaged(file, "holds no JSON object")
        return value

    def verify(self, share: slice = ALL_ROWS) -> None:
        """UserError (exit 5) naming the file, unless all files have the size and hash that the manifest gives.

        `share`: check only this slice of the manifest's files.
        """
        for name, recorded in list(self.files.items())[share]:
            with self._reading(name) as path:
                size = path.stat().st_size
                if size != recorded["size"]:
                    raise self.damaged(name, f"has {size} bytes instead of {recorded['size']}")
                with path.open("rb") as file:
                    actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != recorded["sha256"]:
                raise self.damaged(name, "does not match its hash (damaged)")

    @cached_property
    def state(self) -> dict[str, Any]:
        """The content of trainer_state.json, its form checked."""
        if STATE not in self.files:
            raise self.damaged(STATE, "is missing")
        state = self._json(STATE)
        scale = state.get("loss_scale")
        problem = problem_of(STATE_HINTS, state) or (scale and problem_of(SCALE_HINTS, scale, whole=False))
        growth = scale.get("growth", -1) if not problem and scale else 0
        if not problem and scale and not (0 < scale.get("scale", 0) <= MOST_SCALE and 0 <= growth < MOST_GROWTH):
            problem = f"has loss_scale {scale}"
        if problem:
            raise self.damaged(STATE, problem)
        return state

    @cached_property
    def train_state(self) -> TrainState:
        """The state of the run at this step."""
        try:
            return TrainState.from_json(self.state["train_state"])
        except ValueError as error:
            raise self.damaged(f"{STATE}: train_state", str(error)) from None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.yaml, {section: {flag: value}}."""
        try:
            config = yaml.safe_load(self.text(CONFIG))
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise self.damaged(CONFIG, f"is not YAML ({one_line(error, 80)})") from None
        problem = (
            problem_of({str(key): dict[str, Any] for key in config}, config) if isinstance(config, dict) else "is no mapping"
        )
        if problem or not config:
            raise self.damaged(CONFIG, problem or "is empty")
        return config

    def text(self, file: str) -> str:
        """The content of a text file."""
        if file not in self.files:
            raise self.damaged(file, "is missing")
        try:
            return self._content(file).decode()
        except UnicodeDecodeError:
            raise self.damaged(file, "is not UTF-8") from None

    def _files_of(self, stem: str) -> dict[str, str]:
        """{tensor name: file} of `stem`, `model` or `optimizer`; only files that the manifest names are opened."""
        if stem not in self._file_of:
            single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
            if single in self.files:
                self._file_of[stem] = dict.fromkeys(self._tensors(single).keys(), single)
            elif index in self.files:
                mapping = self._json(index).get("weight_map")
                if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
                    raise self.damaged(index, "has no weight_map")
                stray = sorted(set(mapping.values()) - set(self.files))
                if stray:
                    raise self.damaged(index, f"points to {stray[0]!r:.200}, which is not in the manifest")
                self._file_of[stem] = mapping
            else:
                raise self.damaged(single, "is missing")
        return self._file_of[stem]

    def _tensors(self, file: str) -> Any:
        if file not in self._open:
            try:
                with self._reading(file) as path:
                    self._open[file] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise self.damaged(file, f"is not a safetensors file ({error})") from None
        return self._open[file]

    def close(self) -> None:
        """Unmap the files: a deleted file that is still mapped goes on taking room on the disk."""
        self._open.clear()

    def names(self, stem: str) -> set[str]:
        """Names of the tensors of `stem`: `model` or `optimizer`."""
        return set(self._files_of(stem))

    @cached_property
    def averaged(self) -> dict[str, str]:
        """{parameter: name of the optimizer tensor with its average}; empty for a run without `--ema`."""
        if not self.config.get("optimisation", {}).get("ema") or not self.tensor("optimizer", COUNT) > 0:
            return {}
        names = (name for name in self.names("optimizer") if name.startswith(f"{AVERAGE}."))
        averages = {name.removeprefix(f"{AVERAGE}."): name for name in names}
        for parameter, name in averages.items():
            if self.form("optimizer", name) != self.form("model", parameter):
                raise self.damaged("optimizer.safetensors", f"has {name} in another shape than {parameter}")
        return averages

    def form(self, stem: str, name: str) -> tuple[tuple[int, ...], torch.dtype | None]:
        """(shape, dtype) of a tensor, from the header alone; None for a dtype that no checkpoint has."""
        file = self._files_of(stem)[name]
        try:
            header = self._tensors(file).get_slice(name)
            return tuple(header.get_shape()), DTYPES.get(header.get_dtype())
        except SafetensorError as error:
            raise self.damaged(file, f"lacks {name} ({error})") from None

    def tensor(self, stem: str, name: str, finite: bool = True, *, rows: slice = ALL_ROWS) -> Tensor:
        """A copy of one tensor on the host, or of some of its rows: the others are not read.

        `finite`: raise UserError for NaN or infinity.
        """
        file = self._files_of(stem)[name]
        tensor = rows_in(self._tensors(file), name, rows)
        if finite and not bool(torch.isfinite(tensor).all()):
            raise self.damaged(file, f"holds NaN or infinity in {name}")
        if stem == "optimizer" and name.startswith(NEVER_NEGATIVE) and bool((tensor < 0).any()):
            raise self.damaged(file, f"holds numbers below 0 in {name}")
        return tensor


def resolve(path: str, runs: Mapping[str, Path]) -> Path:
    """The folder of the checkpoint that a user typed: `path` as it stands, else within the first of `runs`, {name: its folder
    of checkpoints}.

    A file ending is ignored, and below a run a leading `checkpoints/`, as that folder may be elsewhere. UserError if there is
    neither, naming up to three checkpoints that there are.
    """
    plain = re.sub(ENDINGS, "", path)
    given, tried = Path(plain).expanduser(), ""
    short = plain.removeprefix("checkpoints/")
    for name, folder in list(runs.items())[:1]:
        own = folder / short
        tried = f", and {name} has no {own}" if "/" not in short else ""
        if not given.is_dir() and own.is_dir():
            given = own
    if given.is_dir():
        return given.resolve()
    near: dict[str, None] = {}  # an ordered set
    for folder in (*runs.values(), given.parent) if "/" not in plain else (given.parent, *runs.values()):
        found = sorted(folder.glob(f"*/{MANIFEST}"), key=lambda file: (file.parent.name != given.name, file))
        near |= {str(file.parent): None for file in found}
    hint = f"there are: {', '.join([*near][:3])}" if near else "train one first, or give the path of one"
    raise UserError(f"no checkpoint folder at {given}{tried}; {hint}")
