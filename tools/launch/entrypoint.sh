#!/usr/bin/env bash
# The first process of a container (or of any service): trains in a run directory, and saves when the container is to stop.
#
#   ENTRYPOINT ["tools/launch/entrypoint.sh"]
#   CMD ["runs/gpt2_wikitext/wide", "accelerate", "launch", "--config_file", "accelerate_configs/ddp.yaml", "recipes/gpt2_wikitext.py"]
#
# In the repository's root; --output_dir is added. SIGTERM and SIGINT stop the run by its stop file; give the container the time
# of a step and a save, twice, before it is killed. Exit status:
#   0   the run is finished, or a person stopped it
#   75  it stopped for the signal, or for --max_training_hours: the same command goes on (EX_TEMPFAIL: to be tried again)
#   else that of the command
set -u
# shellcheck source=tools/launch/stop_file.sh
source "$(dirname "$0")/stop_file.sh"
directory=${1:?usage: entrypoint.sh RUN_DIRECTORY COMMAND...}
shift
run_until_signal 'TERM INT' "$directory" "$@"
if stopped_for_now "$directory"; then exit 75; fi
exit "$code"
