"""When one process of a launch fails or hangs, all end with the same exit code and a message that names the cause.

The first process to fail leaves a note in the launch's key-value store (torchrun's outlives all ranks; the one that rank 0
serves ends with it). For the others a collective then breaks or times out, and they look for the note. If there is none, the
cause is the ranks that do not answer: they have died or hang.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainer.distributed.rendezvous import Rendezvous
from trainer.distributed.signals import terminating
from trainer.errors import LOST, OUT_OF_MEMORY, UserError, one_line, text_of, user_error

if TYPE_CHECKING:
    from trainer.distributed.launch import Launch

ANSWER_SECONDS = 10.0  # a process for which the same collective is broken answers well within this
POLL_SECONDS, MAX_PAUSE_SECONDS = 0.1, 1.0
PAUSES_SECONDS = (0.05, 0.1, 0.25, 0.6)
SIGNALLED_SECONDS = 1.0  # for the note, once the launcher signals all because one process has ended
CALL, ANSWER, LIST = "samecurve/call", "{}/answer/{}", "{}/list"  # keys of the store: when processes start,
FAILURE, WAITING, ANSWERS, NAMING = "failure", "waiting/{}", "answers", "naming"  # and when one has failed
# Words of gloo, NCCL and torch's store for a peer that is gone.
_BROKEN = re.compile(
    r"gloo|nccl|monitored ?barrier|connection (closed|reset|refused)|broken pipe|socket|timed? ?out", re.IGNORECASE
)


def wait_for_all(meeting: Rendezvous, timeout: timedelta) -> Rendezvous:
    """Wait until every process of the launch has started. Returns the meeting with a store that this start alone uses.

    torchrun's store keeps the keys of earlier starts, and the hosts do not agree on the number of restarts. So rank 0 sets a
    call with a new random name, the others answer it with random names of their own, and rank 0 lists the names it has got. A
    rank whose name is not in the list has answered an earlier start's call, and waits for the new one.

    UserError on all processes, with the ranks that have not answered within `timeout`.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    restarted = meeting.rank == 0 and meeting.store.check([CALL])
    call, silent = _call_others(meeting, own, end) if meeting.rank == 0 else _answer_call(meeting, own, end)
    if silent:
        late = TimeoutError(f"not started within --timeout_minutes {timeout.total_seconds() / 60:g}")
        error = _lost(_silence(silent, meeting.processes), late)
        error.known_to_all = 0 not in silent
        raise error
    return Rendezvous(meeting.rank, meeting.processes, dist.PrefixStore(call, meeting.store), restarted)


def _call_others(meeting: Rendezvous, own: str, end: float) -> tuple[str, list[int]]:
    """Rank 0: set the call `own`, and a list of the answers. Returns (call, ranks without an answer at the time `end`)."""
    store = meeting.store
    store.set(CALL, own)
    answers = {rank: ANSWER.format(own, rank) for rank in range(1, meeting.processes)}
    keys = list(answers.values())
    while not (complete := _wait(store, keys)) and time.monotonic() < end:
        pass
    silent = [] if complete else [rank for rank, key in answers.items() if not store.check([key])]
    names = [] if silent else [name.decode() for name in store.multi_get(keys)]
    store.set(LIST.format(own), json.dumps([silent, names]))
    return own, silent


def _answer_call(meeting: Rendezvous, own: str, end: float) -> tuple[str, list[int]]:
    """Other ranks: answer calls with `own` until a list has that name. Returns (call, silent ranks: of the list, or rank 0)."""
    store, rank, call = meeting.store, meeting.rank, ""
    while time.monotonic() < end + 2 * sum(PAUSES_SECONDS):  # a little longer than rank 0, which lists the missing at `end`
        if _wait(store, [CALL]):
            call = store.get(CALL).decode()
            store.set(ANSWER.format(call, rank), own)
        if call and _wait(store, [LIST.format(call)]):
            silent, names = json.loads(store.get(LIST.format(call)))
            if silent or own in names:
                return call, silent
            if "TORCHELASTIC_RUN_ID" not in os.environ:  # without torchrun no earlier start has left this list
                raise UserError(f"RANK={rank} was given to two processes of this launch; give each its own, from 0 on")
    return call, [0]


def _wait(store: Any, keys: Sequence[str]) -> bool:
    """Whether all keys are set within a second. It polls, because Ctrl-C does not interrupt the store's own wait."""
    for pause in PAUSES_SECONDS:
        if store.check(keys):
            return True
        time.sleep(pause)
    return bool(store.check(keys))


def root_cause(error: Exception, rank: int, processes: int, store: Any) -> Exception:
    """The error to report: the failure of the process that failed first. That is `error` itself if this process was first.

    On the other processes it is a UserError with `printed_by_other_rank`, so that one process alone prints it.
    """
    if store is None or (isinstance(error, UserError) and error.known_to_all):
        return error
    # In a thread: if the link to the host of the store is down, its calls block for far longer than this.
    causes: list[Exception] = []
    asking = threading.Thread(target=lambda: causes.append(_cause_by_store(error, rank, processes, store)), daemon=True)
    asking.start()
    asking.join(1.5 * ANSWER_SECONDS)
    if causes:
        return causes[0]
    return _lost("the first host gives no answer", error) if _is_broken(error) else error


def _cause_by_store(error: Exception, rank: int, processes: int, store: Any) -> Exception:
    """`root_cause` by way of the store; may block."""
    try:
        if _is_broken(error):
            error = _await_note(error, store, rank, processes)
        note = json.dumps([rank, text_of(error), error.exit_code if isinstance(error, UserError) else 1])
        failed, text, code = json.loads(store.compare_set(FAILURE, "", note))
    except (RuntimeError, ValueError):  # the store went down with its host
        return _lost("the first host is gone", error) if _is_broken(error) else error
    if failed == rank:
        return error
    return UserError(f"rank {failed}: {text}", code, printed_by_other_rank=True)


def _is_broken(error: Exception) -> bool:
    """Whether this is an error of a collective, or of the store, whose peer is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_BROKEN.search(str(error))))


def _lost(what: str, error: Exception) -> UserError:
    """`what` has happened to the launch, and how to go on; `error`: how this process noticed."""
    return UserError(f"{what}; the same command goes on from the newest checkpoint ({one_line(error, 300)})", LOST)


def _silence(silent: Sequence[int], processes: int) -> str:
    """The ranks that do not answer, in words."""
    names = f"{'ranks' if len(silent) > 1 else 'rank'} {', '.join(map(str, silent))}"
    return f"{names} of {processes} gave no answer: killed, or hung"


def _await_note(error: Exception, store: Any, rank: int, processes: int) -> Exception:
    """Wait until the process that failed has left its note. Returns the error to note if there is none: the silent ranks.

    Each rank polls a single key, and only one of them, the first to set NAMING, checks the keys of all others: a thousand ranks
    that each check a thousand keys would keep the store busy for longer than they wait. A signal from the launcher means that
    it has seen a process end; then the wait is cut to SIGNALLED_SECONDS.
    """
    store.set(WAITING.format(rank), "1")
    if store.add(ANSWERS, 1) == processes:
        return _lost("the processes lost each other", error)
    end, pause = time.monotonic() + ANSWER_SECONDS, POLL_SECONDS
    while time.monotonic() < end and not store.check([FAILURE]):
        if terminating.is_set():
            end = min(end, time.monotonic() + SIGNALLED_SECONDS)
        if terminating.wait(pause):
            time.sleep(pause)
        pause = min(2 * pause, MAX_PAUSE_SECONDS)
    if int(store.compare_set(NAMING, "", str(rank))) != rank:
        _wait(store, [FAILURE])
    silent = [] if store.check([FAILURE]) else [r for r in range(processes) if not store.check([WAITING.format(r)])]
    return _lost(_silence(silent, processes) if silent else "the processes lost each other", error)


@contextlib.contextmanager
def explained(launch: Launch | Rendezvous, optimisation: Any = None) -> Iterator[None]:
    """Replaces an error by its `root_cause` in the launch, and one that users can act on by a UserError that says how.

    `optimisation`: the section of the configuration, for the batch size in a message about memory.
    """
    try:
        yield
    except Exception as error:
        cause = root_cause(
            _out_of_memory(error, optimisation) or user_error(error) or error, launch.rank, launch.processes, launch.store
        )
        if cause is error:
            raise
        raise cause from error


def ran_out_of_memory(error: Exception) -> bool:
    """Whether an error means that the GPU or the host ran out of memory."""
    signs = ("can't allocate memory", "out of memory", "cublas_status_alloc_failed")
    says_so = not isinstance(error, UserError) and any(sign in str(error).lower() for sign in signs)
    return says_so or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _out_of_memory(error: Exception, optimisation: Any) -> UserError | None:
    """A message with the batch size and the remedies to try; None if `error` is not about memory."""
    if not ran_out_of_memory(error):
        return None
    batch = ""
    if optimisation is not None:
        size, accumulation = optimisation.batch_size, optimisation.gradient_accumulation_steps
        arithmetic = f"{size} x {accumulation} accumulation = {optimisation.effective_batch_size}"
        batch = f" with batch_size {arithmetic} samples a step"
    return UserError(
        f"out of memory{batch}; try, in this order: half --batch_size with twice --gradient_accumulation_steps (the same "
        "effective batch; --fit_batch finds what fits), shorter samples, --gradient_checkpointing, "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True. "
        f"Checkpoints are kept. ({one_line(error, 200)})",
        OUT_OF_MEMORY,
    )
