"""A folder of images: which files are samples, what is said of the rest, and how its contents are known again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from recipes.data import image_folder
from recipes.data.images import ImageSets, image_sets


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images in each of two classes."""
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path / "cache"))
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (4, 4), 50 * i).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def sets(root: Path) -> ImageSets:
    return image_sets("folder", str(root), (4, 4), 2, 1, None, None, None, 0)


def test_classes_counts_and_skipped_files_are_said(root: Path) -> None:
    (root / ".ipynb_checkpoints").mkdir()
    (root / "cat" / ".ipynb_checkpoints").mkdir()
    (root / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes(b"")
    (root / "dog" / "._0.png").write_bytes(b"Mac")
    (root / "dog" / "README").write_text("")
    for name in ("a.gif", "b.GIF"):
        Image.new("L", (4, 4)).save(root / "dog" / name)
    (root / "dog" / "more").mkdir()
    Image.new("L", (4, 4)).save(root / "dog" / "more" / "4.png")
    found = sets(root)
    assert found.classes == ["cat", "dog"]
    assert found.notes[0] == f"{root}: 7 images in 2 classes: cat 3, dog 4"
    assert f"{root}: skipped 2 .gif, 2 hidden, 1 without ending" in found.notes[1]


def test_a_class_whose_name_is_no_text_is_found_at_start(root: Path) -> None:
    """No checkpoint could hold its name: it would be found at the first save."""
    shutil.copytree(root / "cat", root / os.fsdecode(b"caf\xe9"))
    with pytest.raises(ValueError, match=r"the name of class 'caf\\udce9' is not UTF-8; rename that folder"):
        sets(root)


def test_several_frames_and_what_is_no_image_are_said_at_start(root: Path) -> None:
    frames = [Image.new("L", (4, 4), 200 * i) for i in range(2)]
    frames[0].save(root / "cat" / "moving.webp", save_all=True, append_images=frames[1:])
    (root / "dog" / "bad.png").write_bytes(b"no image")
    for _ in range(2):  # read, and remembered
        notes = sets(root).notes
        assert notes[1] == f"WARNING: {root}: not readable as images: dog/bad.png"
        assert notes[2] == f"{root}: several frames, of which the first is used: cat/moving.webp"


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_called_like_an_image_and_is_none_is_found_at_start(root: Path, kind: str) -> None:
    path = root / "dog" / "z.png"
    {"folder": path.mkdir, "link": lambda: path.symlink_to("nowhere"), "pipe": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(ValueError, match=r"dog/z\.png has the name of an image but is no file"):
        sets(root)


def test_a_class_without_images_is_refused_but_a_validation_set_may_lack_one(root: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(root / "cat", root / split / "cat")
        shutil.copytree(root / "dog", root / split / "dog")
    shutil.rmtree(root / "val" / "dog")
    assert len(sets(root).validation[1]) == 3
    (root / "train" / "eel").mkdir()
    with pytest.raises(ValueError, match=r"eel holds no image .*remove the folder"):
        sets(root)


def test_other_pixels_of_the_same_size_are_other_data_wherever_the_folder_stands(root: Path) -> None:
    file = root / "cat" / "0.png"
    before, first, stat = file.read_bytes(), sets(root).fingerprint, file.stat()
    file.write_bytes(before[:-1] + b"\x00")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the time put back as well
    assert sets(root).fingerprint != first
    file.write_bytes(before)
    assert sets(root).fingerprint == first
    root.rename(root.with_name("moved"))
    assert sets(root.with_name("moved")).fingerprint == first


def test_files_are_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    frames = image_folder._frames
    monkeypatch.setattr(image_folder, "_frames", lambda path: read.append(path) or frames(path))
    first = sets(root).fingerprint
    assert len(read) == 6
    assert sets(root).fingerprint == first
    assert len(read) == 6
    Image.new("L", (4, 4), 9).save(root / "dog" / "1.png")
    assert sets(root).fingerprint != first
    assert [path.name for path in read[6:]] == ["1.png"]
    assert len(list((root.parent / "cache").iterdir())) == 1
    for index in (root.parent / "cache").glob("*/index.json"):
        index.write_text(index.read_text().replace("dog/1.png", "dog/7.png"))  # damaged: not believed
    sets(root)
    assert len(read) == 7 + 6


def test_a_cache_that_cannot_be_written_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sets(root).fingerprint
    (root.parent / "file").write_text("")
    monkeypatch.setenv("SAMECURVE_CACHE", str(root.parent / "file" / "below"))
    found = sets(root)
    assert found.fingerprint == expected
    assert "SAMECURVE_CACHE" in found.notes[-1]
    assert "every start reads all 6 images" in found.notes[-1]


def test_names_need_not_be_utf8(root: Path) -> None:
    (root / "cat" / "0.png").rename(root / "cat" / os.fsdecode(b"\xff.png"))
    assert sets(root).fingerprint == sets(root).fingerprint
