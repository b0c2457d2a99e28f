"""The recipes in jobs/ for Ray: batchcap reads their commands, Kubernetes their pods."""

import shlex
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helpers.recipes import JOBS, asked_by, text_of

from batchcap import __version__
from batchcap.settings import Engine, RunSettings


def ray_job() -> dict[str, Any]:
    return yaml.safe_load(text_of("rayjob.yaml"))["spec"]


def cluster() -> dict[str, Any]:
    return ray_job()["rayClusterSpec"]


def pods() -> list[dict[str, Any]]:
    (workers,) = cluster()["workerGroupSpecs"]
    return [group["template"] for group in (cluster()["headGroupSpec"], workers)]


@pytest.mark.parametrize("recipe", ["ray-job.sh", "rayjob.yaml"])
def test_a_recipe_opens_with_three_lines_that_explain_it(recipe: str) -> None:
    lines = text_of(recipe).removeprefix("#!/bin/sh\n").splitlines()
    assert [line.startswith("# ") for line in lines[:4]] == [True, True, True, False]
    assert "Captions" in lines[0]
    assert "goes on from what is committed" in lines[2]


def test_kuberay_driver_requests_all_workers(
    asked_of_run: list[RunSettings],
) -> None:
    program, *arguments = shlex.split(ray_job()["entrypoint"])
    asked = asked_by(arguments, asked_of_run)
    (workers,) = cluster()["workerGroupSpecs"]
    assert program == "batchcap"
    assert (asked.engine, asked.address, asked.workers) == (Engine.RAY, "auto", workers["replicas"])
    assert asked.gpus_per_worker is None  # one, since the pods have one
    assert cluster()["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


@pytest.mark.parametrize("pod", pods(), ids=["head", "worker"])
def test_kuberay_pods_follow_kubernetes_schema(pod: dict[str, Any]) -> None:
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **pod}
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)
    (container,) = pod["spec"]["containers"]
    assert container["image"] == f"batchcap-ray:{__version__}"
    assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_job_that_is_submitted_runs_batchcap_on_the_cluster(
    tmp_path: Path, asked_of_run: list[RunSettings]
) -> None:
    program = tmp_path / "ray"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    command = ["/bin/sh", JOBS / "ray-job.sh", "my photos", "captions"]
    done = subprocess.run(
        command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    submitted, _, arguments = done.stdout.partition("--\nbatchcap\n")
    assert submitted == "job\nsubmit\n"
    asked = asked_by(arguments.splitlines(), asked_of_run)
    assert (asked.source, asked.output) == ("my photos", Path("captions"))
    assert (asked.engine, asked.address) == (Engine.RAY, "auto")
