"""The recipes in jobs/ that caption in shards, checked by the tools they are for."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helpers.recipes import JOBS, asked_by, text_of

from batchcap import __version__
from batchcap.settings import RunSettings

SHARDS = 16


def job() -> dict[str, Any]:
    return yaml.safe_load(text_of("indexed-job.yaml"))


def pod() -> dict[str, Any]:
    return job()["spec"]["template"]["spec"]


def slurm_options() -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text_of("shards.sbatch"), re.MULTILINE))


@pytest.mark.parametrize("recipe", ["indexed-job.yaml", "shards.sbatch"])
def test_a_recipe_opens_with_three_lines_that_explain_it(recipe: str) -> None:
    lines = text_of(recipe).removeprefix("#!/bin/bash\n").splitlines()
    assert [line.startswith("# ") for line in lines[:4]] == [True, True, True, False]
    assert "batchcap merge" in lines[2]


# Kubernetes


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_the_manifest_follows_kubernetes_schema(version: str) -> None:
    kubernetes_validate.validate(job(), version, strict=True)


def test_kubernetes_schema_finds_a_typo() -> None:
    wrong = job()
    wrong["spec"]["completionmode"] = wrong["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_each_pod_has_a_shard_of_its_own(asked_of_run: list[RunSettings]) -> None:
    (container,) = pod()["containers"]
    assert (job()["spec"]["completionMode"], job()["spec"]["completions"]) == ("Indexed", SHARDS)
    for index in (0, SHARDS - 1):
        arguments = [
            arg.replace("$(JOB_COMPLETION_INDEX)", f"{index}") for arg in container["args"]
        ]
        assert asked_by(arguments, asked_of_run).shard_numbers == (index, SHARDS)


def test_pods_equal_those_of_the_nightly_run() -> None:
    """Volumes, user and limits of the nightly pod are checked in `test_jobs.py`."""
    nightly = list(yaml.safe_load_all(text_of("cronjob.yaml")))[1]["spec"]["jobTemplate"]["spec"]
    nightly = nightly["template"]["spec"]
    assert pod()["securityContext"] == nightly["securityContext"]
    (mine,), (others) = pod()["containers"], nightly["containers"][0]
    for key in ("securityContext", "resources", "image"):
        assert mine[key] == others[key]
    assert mine["image"] == f"batchcap:{__version__}"
    volumes = [volume for volume in nightly["volumes"] if volume["name"] != "settings"]
    assert pod()["volumes"] == volumes
    mounts = [mount for mount in others["volumeMounts"] if mount["name"] != "settings"]
    assert mine["volumeMounts"] == mounts


def test_kubernetes_retries_only_if_it_may_help() -> None:
    action_of = {
        code: rule["action"]
        for rule in job()["spec"]["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {"values": []})["values"]
    }
    assert action_of == {143: "Ignore", 2: "FailJob", 4: "FailJob", 3: "FailIndex"}
    assert pod()["restartPolicy"] == "Never"  # required by podFailurePolicy
    assert job()["spec"]["backoffLimitPerIndex"] == 3  # required by FailIndex


# Slurm


def test_each_task_has_a_shard_of_its_own(tmp_path: Path, asked_of_run: list[RunSettings]) -> None:
    """Run the script as Slurm does, with the task's number in its environment."""
    assert slurm_options()["array"] == f"0-{SHARDS - 1}"
    program = tmp_path / "batchcap"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    for index in (0, SHARDS - 1):
        task = {"SLURM_ARRAY_TASK_ID": f"{index}", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", JOBS / "shards.sbatch", "my photos", "captions"]
        done = subprocess.run(command, env=task, capture_output=True, text=True, check=True)
        asked = asked_by(done.stdout.splitlines(), asked_of_run)
        assert (asked.source, asked.output, asked.shard_numbers) == (
            "my photos",
            Path("captions"),
            (index, SHARDS),
        )


def test_slurm_sends_sigterm_to_batchcap_in_time() -> None:
    """The script, by then batchcap itself, gets SIGTERM well over ten seconds before the end."""
    target, number, seconds = re.split("[:@]", slurm_options()["signal"])
    assert (target, number) == ("B", "TERM")
    assert int(seconds) >= 30
    assert "\nexec batchcap run " in text_of("shards.sbatch")
