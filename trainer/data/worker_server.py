"""Imported once by the process that data-loading workers are forked from (multiprocessing's forkserver).

A worker that is forked from the training process itself inherits the locks that threads there (gloo, OpenMP, DeepSpeed) hold
at that moment, and may wait for one for ever. The server has no other threads, and has loaded torch already.
"""

import contextlib
import signal

import torch.utils.data  # noqa: F401 - loaded here, once, for every worker

from trainer.distributed.signals import die_with_parent

# The forkserver ends when a pipe to the trainer closes, but the workers hold it open too: they would outlive a killed trainer.
die_with_parent(signal.SIGKILL)

# A signal to the whole process group must not end the server, and with it the workers, while the trainer still saves.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    with contextlib.suppress(ValueError):  # imported elsewhere, outside a main thread
        signal.signal(number, signal.SIG_IGN)
