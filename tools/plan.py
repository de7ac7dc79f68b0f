"""Prints what a launch will take, before it is started: give its command with `python tools/plan.py` in the place of
`accelerate launch`.

python tools/plan.py --config_file accelerate_configs/fsdp.yaml recipes/finetune_lm.py --init_from FOLDER_OR_NAME --gpu h100
python tools/plan.py --multi_gpu --num_processes 16 recipes/gpt2_wikitext.py --batch_size 64 --gpu 4090 --mfu 0.3

Accelerate reads the launcher's files and flags, but no process is started: this one plans for all. After the recipe come its
flags, and --gpu and --mfu, as with --plan (docs/plan.md).
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock


def main(arguments: list[str] | None = None) -> None:
    """Print the plan. Exits with the code of the recipe's `--plan`, or 2 and one line if Accelerate cannot read the launch."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        sys.exit(0 if argv else 2)
    import torch.distributed.run
    from accelerate.commands.launch import launch_command, launch_command_parser

    # Neither claim a port nor connect to other machines.
    quiet = ["--main_process_port", "0", "--deepspeed_multinode_launcher", "standard"]
    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            options = launch_command_parser().parse_args([*quiet, *argv])
    except SystemExit as left:
        if not left.code:  # the launcher's --help
            raise
        reason = usage.getvalue().strip().rpartition("error: ")[2]
        fail(f"{reason}; give the launcher's flags, a recipe's file, and behind it the recipe's flags, --gpu and --mfu")
    script = Path(options.training_script)
    if not script.is_file():
        fail(f"{script} is no file; give a recipe's, such as recipes/gpt2_wikitext.py")

    def print_plan(environ: dict[str, str], processes: int, local: int) -> None:
        os.environ.update(environ, RANK="0", WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(local))
        sys.argv = [str(script), "--plan", *options.training_script_args]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")

    def torchrun(launched: Namespace) -> None:
        local = int(launched.nproc_per_node)
        print_plan({}, local * int(launched.nnodes.rpartition(":")[2]), local)

    def one_process(command: list[str], env: dict[str, str]) -> Any:
        print_plan(env, 1, 1)

    # In place of the processes that Accelerate would start, with the environment that it would give them.
    with mock.patch.object(torch.distributed.run, "run", torchrun), mock.patch.object(subprocess, "Popen", one_process):
        try:
            launch_command(options)
        except (ValueError, OSError, KeyError, TypeError) as error:
            fail(" ".join(str(error).split()))


def fail(reason: str) -> NoReturn:
    """Print one line to stderr and exit with 2."""
    print(f"plan: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
