"""Files put together tensor by tensor are those that the safetensors library reads, in memory that is used again."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, environment
from safetensors.torch import load_file, save

from trainer.backends.tensors import TensorEntry
from trainer.checkpoints.tensor_file import TYPES, TensorFile, in_file_order
from trainer.checkpoints.writing import RankWriter, commit
from trainer.distributed.launch import alone


def entries(tensors: dict[str, torch.Tensor]) -> list[TensorEntry]:
    return [TensorEntry(name, tuple(t.shape), t.dtype, lambda _, t=t: t) for name, t in tensors.items()]


def write(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    file = TensorFile(in_file_order(entries(tensors)))
    for name, tensor in tensors.items():
        file.fill(name, tensor)
    return file.write(path)


def test_the_library_reads_every_type_and_shape(tmp_path: Path) -> None:
    """Odd numbers of narrow elements come first here: written in this order they would leave the wide ones unaligned,

    which a reader that maps the file into memory has to copy, or refuses.
    """
    tensors = {str(kind): (torch.rand(3) * 100).to(kind) for kind in reversed(TYPES)}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.rand(3, 5).t(),
        "ünïcode": torch.ones(1),
    }
    summary = write(tmp_path / "file", tensors)
    content = (tmp_path / "file").read_bytes()
    assert summary == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].equal(tensor), name
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0 for name, tensor in tensors.items())


def test_it_is_the_librarys_own_file(tmp_path: Path) -> None:
    """Byte for byte, where the library keeps our order."""
    tensors = {name: torch.rand(size) for name, size in (("a", 3), ("b", 1), ("c", 70_000))}
    write(tmp_path / "file", tensors)
    assert (tmp_path / "file").read_bytes() == save(tensors, metadata={"format": "pt"})


class Slow(io.FileIO):
    """Takes at most seven bytes of a write, as a file may."""

    def write(self, content: memoryview) -> int:  # type: ignore[override]
        return super().write(content[:7])


def test_what_a_write_does_not_take_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"one": torch.rand(3, 5), "two": torch.arange(40)}
    quick = write(tmp_path / "quick", tensors)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: Slow(path, mode.replace("b", "")))
        assert write(tmp_path / "slow", tensors) == quick
    assert (tmp_path / "slow").read_bytes() == (tmp_path / "quick").read_bytes()


def test_a_tensor_becomes_what_was_announced(tmp_path: Path) -> None:
    """bf16 weights stand in a checkpoint as fp32; another shape would not be the one in the header."""
    file = TensorFile([TensorEntry("w", (4,), torch.float32, lambda _: None)])
    with pytest.raises(AssertionError, match="w: "):
        file.fill("w", torch.zeros(1))  # which copying would spread over all four
    file.fill("w", torch.arange(4).bfloat16())
    file.write(tmp_path / "file")
    assert load_file(tmp_path / "file")["w"].equal(torch.arange(4.0))


def test_saves_take_the_memory_of_one_copy_and_use_it_again(tmp_path: Path) -> None:
    """64 MB of live bf16 weights, each 1 MB: as fp32 a copy is 128 MB. In a new process: not every system forgets a peak."""
    script = f"""
import re
from pathlib import Path
import torch
from trainer.backends.tensors import TensorEntry
from trainer.checkpoints.writing import RankWriter, commit
from trainer.distributed.launch import alone

def peak_megabytes():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000

folder = Path({str(tmp_path)!r})
weights = {{f"layer{{i}}": torch.zeros(500_000, dtype=torch.bfloat16) + i for i in range(64)}}
model = [TensorEntry(name, (500_000,), torch.float32, lambda _, t=t: t) for name, t in weights.items()]
share = RankWriter(alone())
for step in (1, 2):
    before = peak_megabytes()
    share.copy({{"model": model}})
    assert commit(folder, f"step_{{step}}", [share.write(folder, f"step_{{step}}", {{}})]) is None
    print(peak_megabytes() - before)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for step in (1, 2):
        assert (tmp_path / f"step_{step}" / "model.safetensors").stat().st_size > 128e6
    first, second = map(float, done.stdout.split())
    assert 120 < first < 150
    assert second < 16


def test_memory_that_fits_no_longer_is_replaced(tmp_path: Path) -> None:
    """An optimizer keeps more after a parameter was first used."""
    share = RankWriter(alone())
    for step, shapes in enumerate(({"a": 3}, {"a": 3, "b": 2}, {"a": 4, "b": 2})):
        tensors = {name: torch.rand(size) for name, size in shapes.items()}
        share.copy({"optimizer": entries(tensors)})
        assert commit(tmp_path, f"step_{step}", [share.write(tmp_path, f"step_{step}", {})]) is None
        loaded = load_file(tmp_path / f"step_{step}" / "optimizer.safetensors")
        assert {name: tensor.tolist() for name, tensor in loaded.items()} == {n: t.tolist() for n, t in tensors.items()}
