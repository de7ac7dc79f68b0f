"""Ids behind a URL: the same windows as of local files, few requests, a bounded cache, and a server that dies."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from launching import ROOT, free_port
from test_token_files import VOCABULARY, ids_file, one_line

from recipes.data import remote
from recipes.data.remote import BLOCK_BYTES
from recipes.data.token_sets import Mixture, find_files
from recipes.data.token_streams import open_streams
from recipes.data.token_windows import RandomWindows
from trainer.data.bad_samples import is_bad_sample

COUNT = 400_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """An S3 server with s3://texts/web/{0,1}.ids, which are the halves of a local file, and the whole as other.ids."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed (the test extra has it)")
    pytest.importorskip("s3fs", reason="s3fs is not installed (the test extra has it)")
    folder, port = tmp_path_factory.mktemp("s3"), free_port()
    process = start(port)
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "SAMECURVE_CACHE": str(folder / "cache"),
        "NO_PROXY": "127.0.0.1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            ids = ids_file(folder / "whole.ids", COUNT)
            store(port, ids)
            yield SimpleNamespace(process=process, port=port, folder=folder, ids=ids)
        finally:
            process.kill()
            process.wait()


def start(port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def store(port: int, ids: np.ndarray) -> None:
    import s3fs

    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    files = s3fs.S3FileSystem()
    files.mkdir("texts")
    for name, part in (("web/0.ids", ids[: COUNT // 2]), ("web/1.ids", ids[COUNT // 2 :]), ("other.ids", ids)):
        files.pipe_file(f"texts/{name}", part.tobytes())
    files.pipe_file("texts/web/0.ids.json", json.dumps({"dtype": "uint16", "digest": "ab", "largest_id": 999}).encode())


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(method, how many ranges) of what the server was asked."""
    asked = remote._request
    seen: list[tuple[str, int]] = []

    def counted(url: str, method: str, *arguments: object, **options: object) -> object:
        method_name = f"ranged {method}" if "start" in options else method
        seen.append((method_name, len(arguments[0]) if isinstance(arguments[0], list) else 1))
        return asked(url, method, *arguments, **options)

    monkeypatch.setattr(remote, "_request", counted)
    return seen


def test_windows_are_those_of_the_local_file_and_read_once(server: SimpleNamespace, requests: list[tuple[str, int]]) -> None:
    whole = find_files(str(server.folder / "whole.ids"), VOCABULARY)
    starts = np.array([0, 5, COUNT // 2 - 3, COUNT // 2, COUNT - 9, BLOCK_BYTES // 2 - 4])
    for url in ("s3://texts/web/*.ids", "s3://texts/web"):
        far = find_files(url, VOCABULARY)
        assert [file.count for file in far.files] == [COUNT // 2] * 2
        assert np.array_equal(far.windows(9, starts), whole.windows(9, starts))
    requests.clear()
    assert np.array_equal(pickle.loads(pickle.dumps(far)).windows(9, starts), whole.windows(9, starts))
    assert requests == []
    assert np.array_equal(far.ids(), server.ids)
    windows = RandomWindows(Mixture((find_files("s3://texts/other.ids", VOCABULARY),), (1.0,)), 16, 0)
    local = RandomWindows(Mixture((whole,), (1.0,)), 16, 0)
    requests.clear()
    assert np.array_equal(windows.__getitems__(range(500))["tokens"], local.__getitems__(range(500))["tokens"])
    assert requests == [("cat_ranges", -(-2 * COUNT // BLOCK_BYTES))]  # all blocks at once


def test_what_is_known_is_not_read_again(server: SimpleNamespace, requests: list[tuple[str, int]]) -> None:
    source = [("s3://texts/other.ids", 1.0)]
    first = open_streams(source, source, None, VOCABULARY, 16)
    assert ("ranged cat_file", 1) in requests
    # The local file's ids, found out the same way.
    assert first.train.sets[0].check(17) == find_files(str(server.folder / "whole.ids"), VOCABULARY).check(17)
    requests.clear()
    assert open_streams(source, source, None, VOCABULARY, 16).fingerprint == first.fingerprint
    assert requests
    assert "ranged cat_file" not in {method for method, _ in requests}
    assert find_files("s3://texts/web", VOCABULARY).files[0].check(VOCABULARY) == "ab"
    with pytest.raises(ValueError, match=r"s3://texts/other\.ids: token id \d+ at position \d+ is not below .* 500") as error:
        open_streams(source, source, None, 500, 16)
    one_line(error)
    for url, problem in (("s3://texts/none.ids", r"has no \.ids files"), ("nothing://x/a.ids", "nothing:// cannot be opened")):
        with pytest.raises((ValueError, OSError), match=problem):
            find_files(url, VOCABULARY)


def test_the_cache_is_bounded_and_what_was_not_used_goes(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMECURVE_REMOTE_GB", str(3.5 * BLOCK_BYTES / 1e9))
    monkeypatch.setenv("SAMECURVE_CACHE", str(server.folder / "small"))
    (file,) = find_files("s3://texts/other.ids", VOCABULARY).files
    for block in (0, 1, 0, 2, 0, 3, 0, 4):
        file.windows(4, np.array([block * BLOCK_BYTES // 2]))
        time.sleep(0.02)  # the times of files have a resolution
    there = {path.name for path in (server.folder / "small" / "blocks").glob("*/*")}
    assert {"0", "4"} <= there
    assert len(there) <= 3


def test_processes_that_share_a_cache_share_its_bound(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what another one is writing is not removed."""
    monkeypatch.setenv("SAMECURVE_REMOTE_GB", str(6.5 * BLOCK_BYTES / 1e9))
    monkeypatch.setenv("SAMECURVE_CACHE", str(server.folder / "shared"))
    (file,) = find_files("s3://texts/other.ids", VOCABULARY).files
    kept = remote._Blocks(file).folder
    kept.mkdir(parents=True)
    (kept / "9.abc.tmp").write_bytes(b"0" * BLOCK_BYTES)
    (kept / "8.abc.tmp").write_bytes(b"0" * BLOCK_BYTES)
    os.utime(kept / "8.abc.tmp", (0, 0))  # of a process that was killed
    code = (
        "import sys; from recipes.data.remote import _make_room; from pathlib import Path\n"
        "for number in range(40):\n"
        "    Path(sys.argv[1], f'{sys.argv[2]}{number}').write_bytes(b'0' * int(sys.argv[3]))\n"
        "    _make_room(Path(sys.argv[1]).parent, int(sys.argv[3]), int(sys.argv[4]))\n"
    )
    sizes = [str(BLOCK_BYTES), str(int(6.5 * BLOCK_BYTES))]
    processes = [subprocess.Popen([sys.executable, "-c", code, str(kept), name, *sizes], cwd=ROOT) for name in "ab"]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    there = {path.name for path in kept.iterdir()}
    assert "9.abc.tmp" in there
    assert "8.abc.tmp" not in there
    assert 3 <= len(there - {"9.abc.tmp"}) <= 6


def test_a_damaged_block_is_fetched_again(server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMECURVE_CACHE", str(server.folder / "damaged"))
    (file,) = find_files("s3://texts/other.ids", VOCABULARY).files
    starts = np.array([3])
    expected = file.windows(9, starts)
    block = remote._Blocks(file).folder / "0"
    intact = block.read_bytes()
    for damaged in (intact[:-9], b"", b"1", bytes([intact[0] ^ 1]) + intact[1:]):
        block.write_bytes(damaged)
        assert np.array_equal(file.windows(9, starts), expected)
        assert block.read_bytes() == intact


def test_a_cache_that_cannot_be_written_costs_no_sample(
    server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = server.folder / "unwritable"
    monkeypatch.setenv("SAMECURVE_CACHE", str(cache))
    (file,) = find_files("s3://texts/other.ids", VOCABULARY).files
    expected = file.windows(9, np.array([3]))
    shutil.rmtree(cache / "blocks")
    (cache / "blocks").write_text("is no folder")
    for _ in range(2):
        assert np.array_equal(file.windows(9, np.array([3])), expected)
    (message,) = caplog.messages
    assert re.search(r"unwritable/blocks cannot keep what is read of URLs \(.*\): it is read again", message)
    for said in ("20GB", "-1", "nan"):
        monkeypatch.setenv("SAMECURVE_REMOTE_GB", said)
        with pytest.raises(ValueError, match=rf"SAMECURVE_REMOTE_GB is '{said}'; set it to a number of gigabytes") as error:
            find_files("s3://texts/other.ids", VOCABULARY)
        one_line(error)


def test_what_is_refused_of_a_local_file_is_refused_behind_a_url(server: SimpleNamespace, tmp_path: Path) -> None:
    import s3fs

    np.save(tmp_path / "a.npy", server.ids)
    for name, content, sidecar, problem in (
        ("a.npy", (tmp_path / "a.npy").read_bytes(), None, "is a .npy array, and read where it is local alone"),
        ("b.ids", b"Once upon a time. " * 20, None, "is text, not ids"),
        ("c.ids", server.ids[:100].tobytes(), {"dtype": "uint16", "count": 200}, "holds 100 ids, its .json says 200"),
        ("d.ids", server.ids[:100].tobytes(), {"dtype": 16}, "d.ids.json has dtype 16"),
        ("e.ids", b"", None, "is empty"),
        ("f.ids", b"\1\2\3", {}, "has 3 bytes, no whole number"),
    ):
        files = s3fs.S3FileSystem()
        files.pipe_file(f"texts/bad/{name}", content)
        if sidecar is not None:
            files.pipe_file(f"texts/bad/{name}.json", json.dumps(sidecar).encode())
        with pytest.raises(ValueError, match=re.escape(problem)) as error:
            find_files(f"s3://texts/bad/{name}", VOCABULARY).check(1)
        assert f"s3://texts/bad/{name}" in one_line(error)


def test_a_start_takes_few_requests_however_many_shards(server: SimpleNamespace, requests: list[tuple[str, int]]) -> None:
    import s3fs

    files = s3fs.S3FileSystem()
    known = {"dtype": "uint16", "count": 1000, "digest": "ab", "largest_id": 999}
    for number in range(20):
        files.pipe_file(f"texts/many/{number:02}.ids", server.ids[:1000].tobytes())
        files.pipe_file(f"texts/many/{number:02}.ids.json", json.dumps(known).encode())
    for url in ("s3://texts/many", "s3://texts/many/*", "s3://texts/many/*.ids"):
        requests.clear()
        streams = open_streams([(url, None)], [(url, None)], None, VOCABULARY, 16)
        assert streams.train.count == 20_000
        assert sorted(requests) == [("cat", 20)] * 2 + [("find" if url.endswith("many") else "glob", 1)] * 2


class Wire(threading.Thread):
    """Passes bytes on between clients and a server, which is killed once it has sent so many of them: in mid-answer."""

    def __init__(self, server: SimpleNamespace, answer_bytes: int) -> None:
        super().__init__(daemon=True)
        self.server, self.left = server, answer_bytes
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):  # once the server is gone
            while self.left > 0:
                client, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.server.port))
                threading.Thread(target=self._requests, args=(client, far), daemon=True).start()
                threading.Thread(target=self._answers, args=(client, far), daemon=True).start()

    def _requests(self, client: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := client.recv(1 << 16):
                far.sendall(content)

    def _answers(self, client: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while self.left > 0 and (content := far.recv(1 << 10)):
                client.sendall(content[: max(0, self.left)])
                self.left -= len(content)
            if self.left <= 0:
                self.server.process.kill()
                self.listener.shutdown(socket.SHUT_RDWR)
            client.shutdown(socket.SHUT_RDWR)


def test_a_server_killed_in_mid_read_is_an_error_that_names_the_url_and_nothing_half_read_stays(
    server: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this file."""
    import s3fs

    starts = np.arange(0, COUNT - 4, BLOCK_BYTES // 8)
    expected = find_files(str(server.folder / "whole.ids"), VOCABULARY).windows(4, starts)
    files = find_files("s3://texts/web", VOCABULARY)
    assert len(files.windows(4, starts[:1])) == 1
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # of five, each after a longer pause

    cache = tmp_path / "cache"
    with monkeypatch.context() as over_the_wire:
        over_the_wire.setenv("SAMECURVE_CACHE", str(cache))
        over_the_wire.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{Wire(server, 5 * BLOCK_BYTES // 2).port}")
        with fresh_file_system(), pytest.raises(OSError, match=r"s3://texts/web/[01]\.ids cannot be read") as error:
            files.windows(4, starts)
    one_line(error)
    assert not is_bad_sample(error.value)
    assert server.process.wait(timeout=30) == -signal.SIGKILL
    assert len(files.windows(4, starts[:1])) == 1  # what was here is here
    monkeypatch.setenv("SAMECURVE_CACHE", str(cache))
    with pytest.raises(OSError, match=r"s3://texts/web/0\.ids cannot be read"):
        files.windows(4, starts[:1])

    server.process = start(server.port)
    try:
        store(server.port, server.ids)
        with fresh_file_system():
            assert np.array_equal(files.windows(4, starts), expected)
    finally:
        server.process.kill()
        server.process.wait()


@contextlib.contextmanager
def fresh_file_system() -> Iterator[None]:
    """One that connects anew, to where the environment says."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    remote._file_system.cache_clear()
    yield
    s3fs.S3FileSystem.clear_instance_cache()
    remote._file_system.cache_clear()
