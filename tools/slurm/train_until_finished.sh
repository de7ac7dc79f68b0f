#!/usr/bin/env bash
# Sourced by the batch scripts beside it, from the repository's root.

# Signals that launchers pass on to the training processes instead of dying of them, and the seconds these then have to save.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun no longer takes it over from sbatch by itself
# Jobs that share a node get ports of their own, below those that the kernel gives to connections.
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))

# shellcheck source=tools/launch/stop_file.sh
source tools/launch/stop_file.sh

# train_until_finished DIRECTORY COMMAND...
# Runs a command that trains in this run directory, and ends the job as that ends:
#   the run is finished, or a person stopped it    exit 0
#   it stopped because its time was up (the job's,
#     or --max_training_hours, which counts anew)   the job is requeued, and then the same command continues the run
#   it failed, and has saved something new         the same: a lost node or process, memory that ran out
#   it failed, and has not                         with its exit status
# When Slurm signals that the end is near, the run is stopped by its stop file.
train_until_finished() {
    local directory=$1 before word why='its time was up'
    shift
    for word in "$@"; do
        case $word in --output[_-]dir* | --run[_-]name*)
            echo "error: the job's name names the run: use sbatch --job-name=NAME (and RUNS=FOLDER) instead of $word" >&2
            exit 2
            ;;
        esac
    done
    before=$(status "$directory" checkpoint)
    run_until_signal USR1 "$directory" "$@"
    if ! stopped_for_now "$directory"; then
        if [ "$code" -eq 0 ] || [ "$(status "$directory" state)" = stopped ]; then exit "$code"; fi
        why="it ended with $code"
    fi
    if [ "$(status "$directory" checkpoint)" = "$before" ]; then
        echo "error: $directory has nothing new since ${before:-its start}: not requeued; $why" >&2
        exit "$((code ? code : 1))"
    fi
    echo "Requeued at step $(status "$directory" step) of $directory: $why"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # Slurm ends the script meanwhile
    exit 1
}
