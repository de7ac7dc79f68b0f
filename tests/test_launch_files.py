"""The files of tools/launch: what they start exists, and the commands in them are ones that this repository has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import ROOT

FOLDER = ROOT / "tools" / "launch"
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix != ".sh")


def pods() -> dict[str, Any]:
    """The pods of the Kubernetes files."""
    jobset = yaml.safe_load((FOLDER / "kubernetes_jobset.yaml").read_text())
    pytorch = yaml.safe_load((FOLDER / "kubernetes_pytorchjob.yaml").read_text())
    templates = {"JobSet": jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]}
    templates |= {name: each["template"] for name, each in pytorch["spec"]["pytorchReplicaSpecs"].items()}
    return {name: template["spec"] for name, template in templates.items()}


def test_pods_are_nobody_in_particular_and_may_save_before_they_are_killed() -> None:
    assert set(pods()) == {"JobSet", "Master", "Worker"}
    for pod in pods().values():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["terminationGracePeriodSeconds"] >= 300
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["args"][0].startswith("exec tools/launch/entrypoint.sh /runs/")  # as process 1
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_of_the_repository_that_is_named_is_there(path: Path) -> None:
    named = set(re.findall(r"\b(?:tools|recipes|ds_configs|accelerate_configs)/[\w/]+\.(?:sh|py|json|yaml)", path.read_text()))
    assert path.name == "hostfile" or "tools/launch/entrypoint.sh" in named
    assert {name for name in named if not (ROOT / name).is_file()} <= {"recipes/NAME.py"}


def test_the_commands_of_the_cloud_are_bash() -> None:
    sky = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    for script in (sky["setup"], sky["run"], *(pod["containers"][0]["args"][0] for pod in pods().values())):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")
