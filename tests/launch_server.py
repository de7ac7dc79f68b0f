"""Launches without imports: a server process has imported what every rank needs, and the ranks of each launch are its forks.

With `accelerate launch` two ranks need six seconds of a core to import torch and the rest, while most tests are about what they
do afterwards. Here Accelerate's launcher reads its file and sets its variables as usual; only its last step, which would start
an interpreter per rank, is replaced by forks. Tests of kills, signals and launches themselves use the real commands.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import socket
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

from launching import TIMEOUT_SECONDS, Started, command, environment

IMPORTED = ("accelerate.commands.launch", "torch.distributed.run", "trainer.loop", "trainer.backends.plain", "scenarios")
IMPORTED += ("transformers", "torch._inductor.compile_fx")  # DeepSpeed imports these, in every rank


def launch_forked(kind: str, folder: Path, env: Mapping[str, str]) -> None:
    """Call `scenarios.train_all(folder)` in each process of a launch of `kind`, with the environment `env`.

    Their output goes to `folder`/log.txt. Fails the test on a time-out, or if a process does not exit with 0.
    """
    process, connection = _server()
    log = folder / "log.txt"
    try:
        connection.sendall(json.dumps([kind, str(folder), dict(env)]).encode() + b"\n")
        answer = connection.recv(100)
    except TimeoutError:
        answer = b""
    if not answer:
        process.kill_all()
        _server.cache_clear()
    text = log.read_text(errors="replace") if log.exists() else process.log.read_text(errors="replace")
    assert answer, f"{kind} launch hung for {TIMEOUT_SECONDS} s, or its server died:\n{text[-3000:]}"
    assert answer == b"0\n", f"{kind} launch: exit code {answer.decode().strip()}:\n{text[-3000:]}"


@functools.cache
def _server() -> tuple[Started, socket.socket]:
    """(server, socket to it), started at the first call. `Started` ends the server with this process."""
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_SECONDS)
    log = Path(tempfile.mkdtemp(prefix="launch-server-"), "log.txt")
    argv = [sys.executable, __file__, str(theirs.fileno())]
    process = Started(argv, log, environment(), pass_fds=[theirs.fileno()])
    theirs.close()
    return process, ours


def serve(connection: socket.socket) -> None:
    """The server: for each line [kind, folder, environment] start a launch in a fork, and answer with its exit code."""
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    for line in connection.makefile("rb"):
        kind, folder, env = json.loads(line)
        child = _fork(functools.partial(_start, connection, kind, Path(folder), env))
        connection.sendall(b"%d\n" % _exit_code(child))


def _start(connection: socket.socket, kind: str, folder: Path, env: Mapping[str, str]) -> None:
    """In the fork of a launch: set up log and environment, and launch."""
    os.close(connection.detach())  # else the test could not notice that the server has died
    from accelerate.commands import launch
    from scenarios import train_all
    from torch.distributed import run

    out = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.clear()
    os.environ.update(env)
    if kind == "one":
        train_all(folder)
    run.run = functools.partial(_fork_ranks, functools.partial(train_all, folder))
    _, _, _, *arguments = command(kind, Path(__file__))  # python -m accelerate.commands.launch
    launch.launch_command(launch.launch_command_parser().parse_args(arguments))


def _fork_ranks(action: Callable[[], None], arguments: Namespace) -> None:
    """In place of `torch.distributed.run.run(arguments)`: call `action` in a fork per rank, with torch's variables set.

    Exits with the first exit code that is not 0.
    """
    from trainer.backends import backend_of

    backend_of(os.environ).before_connect(True)  # imports DeepSpeed, if this launch uses it
    processes = str(arguments.nproc_per_node)
    os.environ |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(arguments.master_port)}

    def rank(number: str) -> None:
        os.environ |= {"RANK": number, "LOCAL_RANK": number}
        action()

    children = [_fork(functools.partial(rank, str(number))) for number in range(int(processes))]
    codes = [_exit_code(child) for child in children]
    os._exit(next(filter(None, codes), 0))


def _fork(action: Callable[[], None]) -> int:
    """Call `action` in a fork, which then exits with 0, or with 1 after an error. Returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _exit_code(child: int) -> int:
    """Wait for a fork to end."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
