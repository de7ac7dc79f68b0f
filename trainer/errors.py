"""How a launch ends: the exit codes, and the one exception that is a message for the user instead of a bug."""

FINISHED = 0  # the last step, or stopped as asked
BAD_INPUT = 2  # a configuration, a flag, or data that cannot be used
NOT_FINITE = 4  # too many steps in a row with a gradient that is not finite
CHECKPOINT = 5  # a checkpoint that cannot be read, a disk that cannot be written
OUT_OF_MEMORY = 6  # the device has no memory left
INTERRUPTED = 130  # Ctrl-C before there was anything to save, or twice


class Refusal(Exception):  # noqa: N818 - not an error of the program
    """One line for the user: what is wrong, where, and what to do next. `main` prints it without a traceback.

    `exit_code` is the status of the process, one of the constants above.
    """

    def __init__(
        self, message: str, exit_code: int = BAD_INPUT, known_to_all: bool = False, said_elsewhere: bool = False
    ) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.known_to_all = known_to_all  # every process of the launch raises it: rank 0 speaks for all
        self.said_elsewhere = said_elsewhere  # the process whose failure it is speaks itself
