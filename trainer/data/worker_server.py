"""Imported once by the process that data-loading workers are forked from (multiprocessing's forkserver).

A worker forked from the training process itself inherits the locks that its threads (gloo, OpenMP, DeepSpeed) happened to
hold at that moment, and now and then waits for one for ever. The server has no other threads, and torch is loaded already.
"""

import contextlib
import signal

import torch.utils.data  # noqa: F401 - loaded here, once, for every worker

from trainer.distributed.signals import die_with_parent

# Its own sign that the trainer is gone is a pipe that the workers hold open too; a killed trainer must leave none of them.
die_with_parent(signal.SIGKILL)

# A signal to the whole process group must not take the server, and with it the workers, from a trainer that still saves.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    with contextlib.suppress(ValueError):  # imported elsewhere, outside a main thread
        signal.signal(number, signal.SIG_IGN)
