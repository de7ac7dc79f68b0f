"""When one process of a launch fails or falls silent, all end with the same message and status, and the cause is named.

The first process to fail leaves a note in the launch's key-value store (torchrun's own outlives any rank; that of ranks
started by hand ends with rank 0). The others meet a broken or timed-out collective, and find the note. Where there is none,
whoever does not answer has died or hangs.
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

ANSWER_SECONDS = 10.0  # a process that meets the same broken collective gets to its answer well within this
POLL_SECONDS, MAX_PAUSE_SECONDS = 0.1, 1.0
PAUSES_SECONDS = (0.05, 0.1, 0.25, 0.6)
SIGNALLED_SECONDS = 1.0  # where a launcher that has seen one end signals the others
CALL, ANSWER, LIST = "samecurve/call", "{}/answer/{}", "{}/list"
FAILURE, WAITING, ANSWERS, NAMING = "failure", "waiting/{}", "answers", "naming"
# What gloo, NCCL and torch's store say where the other end is gone.
_BROKEN = re.compile(
    r"gloo|nccl|monitored ?barrier|connection (closed|reset|refused)|broken pipe|socket|timed? ?out", re.IGNORECASE
)


def wait_for_all(meeting: Rendezvous, timeout: timedelta) -> Rendezvous:
    """Until every process of the launch has started; with a part of the store that is this start's alone.

    torchrun's store outlives restarts, which every host counts for itself. So rank 0 calls under a name that is new, the others
    answer with names of their own, and a call is ours if its list of answers, which rank 0 makes, has our name in it.

    UserError on all, naming those that have not answered within `timeout`.
    """
    store, rank, own = meeting.store, meeting.rank, uuid.uuid4().hex
    end, call, restarted = time.monotonic() + timeout.total_seconds(), own, rank == 0 and store.check([CALL])
    listed: list[str] = []
    if rank == 0:
        store.set(CALL, own)
        answers = [ANSWER.format(own, other) for other in range(1, meeting.processes)]
        while not (complete := _wait(store, answers)) and time.monotonic() < end:
            pass
        silent = [] if complete else [other + 1 for other, key in enumerate(answers) if not store.check([key])]
        listed = [] if silent else [own, *(name.decode() for name in store.multi_get(answers))]
        store.set(LIST.format(own), json.dumps([silent, listed]))
    else:
        silent = [0]
        while own not in listed and time.monotonic() < end + 2 * sum(PAUSES_SECONDS):  # rank 0 finds out who is missing
            if _wait(store, [CALL]):
                call = store.get(CALL).decode()
                store.set(ANSWER.format(call, rank), own)
            if call != own and _wait(store, [LIST.format(call)]):
                silent, listed = json.loads(store.get(LIST.format(call)))
                if silent:
                    break
                if own not in listed and "TORCHELASTIC_RUN_ID" not in os.environ:  # else it is the call of an earlier start
                    raise UserError(f"RANK={rank} was given to two processes of this launch; give each its own, from 0 on")
    if own not in listed:
        late = TimeoutError(f"not started within --timeout_minutes {timeout.total_seconds() / 60:g}")
        error = _lost(_silence(silent, meeting.processes), late)
        error.known_to_all = 0 not in silent
        raise error
    return Rendezvous(rank, meeting.processes, dist.PrefixStore(call, store), restarted)


def _wait(store: Any, keys: Sequence[str]) -> bool:
    """Whether all keys are there within a second. Asked for a few times: the store's own wait hears no Ctrl-C."""
    for pause in PAUSES_SECONDS:
        if store.check(keys):
            return True
        time.sleep(pause)
    return bool(store.check(keys))


def root_cause(error: Exception, rank: int, processes: int, store: Any) -> Exception:
    """What this process should report: `error`; or, if that is only what another one's failure looks like from here, that.

    One process prints it: the others get a UserError with `printed_by_other_rank`.
    """
    if store is None or (isinstance(error, UserError) and error.known_to_all):
        return error
    # The store lives on the first host. Behind a link that is down its calls wait for longer than anybody should.
    causes: list[Exception] = []
    asking = threading.Thread(target=lambda: causes.append(_cause_by_store(error, rank, processes, store)), daemon=True)
    asking.start()
    asking.join(1.5 * ANSWER_SECONDS)
    if causes:
        return causes[0]
    return _lost("the first host gives no answer", error) if _is_broken(error) else error


def _cause_by_store(error: Exception, rank: int, processes: int, store: Any) -> Exception:
    """`root_cause`, by the key-value store of the launch."""
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
    """Whether this is how a collective ends that another process has left."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_BROKEN.search(str(error))))


def _lost(what: str, error: Exception) -> UserError:
    return UserError(f"{what}; the same command goes on from the newest checkpoint ({one_line(error, 300)})", LOST)


def _silence(silent: Sequence[int], processes: int) -> str:
    names = f"{'ranks' if len(silent) > 1 else 'rank'} {', '.join(map(str, silent))}"
    return f"{names} of {processes} gave no answer: killed, or hung"


def _await_note(error: Exception, store: Any, rank: int, processes: int) -> Exception:
    """Wait for the note of the process that failed; else a UserError with the ranks that do not answer.

    A rank asks for one key at a time, and one of them alone looks for all the others: of a thousand, each asking for each, the
    store would take longer than they wait. Where the launcher signals, it has seen a process end: the rest answers at once.
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
    """Turns an error into what a person can do about it, and one that came from another process into that process's."""
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
    """Whether the device, or the host, had no memory left."""
    signs = ("can't allocate memory", "out of memory", "cublas_status_alloc_failed")
    says_so = not isinstance(error, UserError) and any(sign in str(error).lower() for sign in signs)
    return says_so or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _out_of_memory(error: Exception, optimisation: Any) -> UserError | None:
    """One message with the resolved batch arithmetic and the remedies in order; None for any other error."""
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
