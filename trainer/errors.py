"""How a launch ends: the exit codes, and the one exception that is a message for the user instead of a bug."""

import errno
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
"""the folder that holds `trainer`: the repository's root in an editable install, else site-packages"""

FINISHED = 0  # the last step, or stopped on request
LOST = 1  # another process of this launch, or a data worker, was killed or hangs. Python uses it too, for a bug
BAD_INPUT = 2  # a configuration, a flag, or data that cannot be used
NOT_FINITE = 4  # too many steps in a row with a gradient that is not finite
CHECKPOINT = 5  # a checkpoint that cannot be read, a disk that cannot be written
OUT_OF_MEMORY = 6  # the device has no memory left
INTERRUPTED = 130  # Ctrl-C before there was anything to save, or twice


class UserError(Exception):
    """One line for the user: what is wrong, where, and what to do next. `main` prints it without a traceback.

    `exit_code` is the status of the process, one of the constants above.
    """

    def __init__(
        self, message: str, exit_code: int = BAD_INPUT, known_to_all: bool = False, printed_by_other_rank: bool = False
    ) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.known_to_all = known_to_all
        """every process of the launch raises it, so rank 0 alone prints it"""
        self.printed_by_other_rank = printed_by_other_rank


def user_error(error: BaseException) -> UserError | None:
    """The UserError that says what to do about `error`, where the machine refused a file, memory, a thread or a home directory.

    A UserError is returned as it is; None for any other error.
    """
    if isinstance(error, UserError):
        return error
    text = one_line(error, 300)
    signs = ("can't start new thread", "cannot allocate memory", "failed to map segment")
    number = error.errno if isinstance(error, OSError) else None
    exhausted = number in (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE) or isinstance(error, MemoryError)
    if exhausted or any(sign in text.lower() for sign in signs):
        way_out = "end other processes of yours, or raise its limit (ulimit -u, -v, -n; the container's or the job's memory)"
        return UserError(
            f"this machine gives no more memory, threads or files ({text or 'MemoryError'}); {way_out}", OUT_OF_MEMORY
        )
    if "determine home directory" in text or "getpwuid" in text:
        return UserError(
            f"no home directory can be found ({text}); set HOME, or SAMECURVE_CACHE for the cache, and give paths without ~"
        )
    # A file that is missing, or exists already, is a bug here: where that may happen to a user, the caller has a message.
    if isinstance(error, OSError) and error.filename is not None and number not in (errno.ENOENT, errno.EEXIST, errno.EBADF):
        return UserError(f"{error.filename}: {error.strerror}; mend that, or give another path", CHECKPOINT)
    return None


def text_of(error: BaseException) -> str:
    """An error in words: the message of a UserError, and before any other its type."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def one_line(error: BaseException, characters: int | None = None) -> str:
    """The text of an error in one line, cut to so many characters (None: uncut)."""
    return " ".join(str(error).split())[:characters]


def path_of(relative_path: str) -> str:
    """How a message names a file of the repository (`accelerate_configs/ddp.yaml`), which an installed package may lack.

    The relative path if it exists in the working directory, else the absolute one below REPOSITORY if that exists, else the
    relative path and where to find it.
    """
    if Path(relative_path).exists():
        return relative_path
    beside = REPOSITORY / relative_path
    return str(beside) if beside.exists() else f"{relative_path} in samecurve's source repository"
