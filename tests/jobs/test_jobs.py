"""The recipes in jobs/ for unattended runs, and the Dockerfile, checked by their tools."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helpers.places import ROOT
from helpers.recipes import JOBS, asked_by, text_of

from batchcap import __version__
from batchcap.settings import RunSettings

RECIPES = ["nightly.toml", "crontab", "batchcap.service", "batchcap.timer", "cronjob.yaml"]
CRON_FIELDS = {
    "minute": (0, 59),
    "hour": (0, 23),
    "day": (1, 31),
    "month": (1, 12),
    "weekday": (0, 7),
}
KUBERNETES_VERSIONS = ["1.31", kubernetes_validate.latest_version()]

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def crontab() -> tuple[dict[str, str], list[str], str]:
    """Return the variables of the crontab, and its entry's five time fields and command."""
    lines = [line for line in text_of("crontab").splitlines() if line and line[0] != "#"]
    variables = dict(line.split("=", 1) for line in lines[:-1])
    *times, command = lines[-1].split(maxsplit=5)
    return variables, times, command


def service() -> dict[str, str]:
    lines = [line for line in text_of("batchcap.service").splitlines() if "=" in line]
    return dict(line.split("=", 1) for line in lines if line[0] != "#")


def manifests() -> list[Any]:
    return list(yaml.safe_load_all(text_of("cronjob.yaml")))


def pod() -> dict[str, Any]:
    return manifests()[1]["spec"]["jobTemplate"]["spec"]["template"]["spec"]


def commands() -> dict[str, list[str]]:
    return {
        "crontab": shlex.split(crontab()[2].split(">>")[0]),
        "batchcap.service": shlex.split(service()["ExecStart"]),
        "cronjob.yaml": ["batchcap", *pod()["containers"][0]["args"]],
    }


@pytest.mark.parametrize("job", RECIPES)
def test_recipe_opens_with_its_purpose_and_behaviour(job: str) -> None:
    opening = re.match(r"(#.*\n)+", text_of(job))
    assert opening
    for word in ("Does", "Overlap", "Failure", "Shutdown"):
        assert f"\n# {word}: " in opening[0], word


def test_all_recipes_run_the_same_command_with_nightly_toml() -> None:
    (run, *arguments), *others = commands().values()
    assert run == "batchcap"
    assert all(other[1:] == arguments for other in others)
    assert arguments[:3] == ["run", "--config", "/etc/batchcap/nightly.toml"]
    assert shlex.join(arguments) in re.sub(r" \\\n# +", " ", text_of("nightly.toml"))


def test_the_same_batchcap_is_run_by_cron_and_systemd() -> None:
    program = Path(service()["ExecStart"].split()[0])
    assert crontab()[0]["PATH"].split(":")[0] == str(program.parent)


@pytest.mark.parametrize("job", ["crontab", "batchcap.service", "cronjob.yaml"])
def test_the_command_of_a_recipe_is_accepted_with_all_of_nightly_toml(
    job: str, asked_of_run: list[RunSettings]
) -> None:
    arguments = commands()[job][1:]
    arguments[2] = str(JOBS / "nightly.toml")
    asked = asked_by(arguments, asked_of_run)
    for key, value in tomllib.loads(text_of("nightly.toml"))["run"].items():
        assert type(value)(getattr(asked, key.replace("-", "_"))) == value, key


def test_the_metrics_are_written_beside_the_captions() -> None:
    """Systemd and Kubernetes let the run write only to the output folder."""
    settings = tomllib.loads(text_of("nightly.toml"))["run"]
    out = Path(commands()["crontab"][-1]).parent
    assert Path(settings["metrics-file"]).parent == out
    assert service()["ReadWritePaths"] == str(out)


# cron


def test_the_time_fields_of_the_crontab_are_valid() -> None:
    for field, (name, (least, most)) in zip(crontab()[1], CRON_FIELDS.items(), strict=True):
        for part in field.split(","):
            assert re.fullmatch(r"(\*|\d+(-\d+)?)(/[1-9]\d*)?", part), name
            assert all(least <= int(number) <= most for number in re.findall(r"\d+", part)), name


def test_command_of_the_crontab_is_valid_shell_without_percent_signs() -> None:
    command = crontab()[2]
    subprocess.run(["bash", "-n", "-c", command], check=True)
    assert "%" not in command  # cron turns it into a line break


def run_by_cron(folder: Path, exit_code: int, log: Path) -> str:
    """Return cron's mail if batchcap prints 30 lines and exits with `exit_code`."""
    program = folder / "bin" / "batchcap"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\necho "$@"\nseq -f "line %g" 30 >&2\nexit {exit_code}\n')
    program.chmod(0o755)
    variables, _, command = crontab()
    variables |= {"LOG": str(log), "PATH": f"{program.parent}:/usr/bin:/bin"}
    result = subprocess.run(
        [variables["SHELL"], "-c", command],
        env=variables,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.stdout


@pytest.mark.parametrize("exit_code", [0, 5])
def test_cron_is_silent_when_all_is_well(tmp_path: Path, exit_code: int) -> None:
    log = tmp_path / "nightly.log"
    log.write_text("last night\n")
    assert run_by_cron(tmp_path, exit_code, log) == ""
    arguments = shlex.join(commands()["crontab"][1:])
    assert log.read_text().splitlines()[:3] == ["last night", arguments, "line 1"]


@pytest.mark.parametrize("exit_code", [1, 2, 3, 4, 137, 143])
def test_cron_mails_the_end_of_the_log_on_failure(tmp_path: Path, exit_code: int) -> None:
    log = tmp_path / "nightly.log"
    first, *others = run_by_cron(tmp_path, exit_code, log).splitlines()
    assert first == f"batchcap: exit code {exit_code}; the end of {log}:"
    assert others == [f"line {number}" for number in range(11, 31)]


def test_cron_mails_if_the_log_cannot_be_written(tmp_path: Path) -> None:
    assert "missing/nightly.log" in run_by_cron(tmp_path, 0, tmp_path / "missing" / "nightly.log")


# systemd


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """Return the units with an existing program, which systemd-analyze checks."""
    written = [tmp_path / "batchcap.service", tmp_path / "batchcap.timer"]
    for unit in written:
        text = text_of(unit.name).replace("=/opt/batchcap/bin/batchcap ", f"={sys.executable} ")
        unit.write_text(text, encoding="utf-8")
    return written


def verified(units: list[Path]) -> str:
    """Return systemd's objections; its exit code is 0 even for an unknown key."""
    verify = ["systemd-analyze", "verify", "--man=no", *map(str, units)]
    return subprocess.run(verify, capture_output=True, text=True, check=False).stderr


@needs_systemd
def test_systemd_accepts_the_units(units: list[Path]) -> None:
    assert verified(units) == ""


@needs_systemd
@pytest.mark.parametrize(
    ("line", "typo"),
    [("NoNewPrivileges=true", "NoNewPrivilege=true"), ("OnCalendar=*-*-* 02", "OnCalendar=*-* 25")],
)
def test_systemd_finds_a_typo_in_a_unit(units: list[Path], line: str, typo: str) -> None:
    for unit in units:
        unit.write_text(unit.read_text(encoding="utf-8").replace(line, typo), encoding="utf-8")
    assert verified(units) != ""


@needs_systemd
def test_systemd_finds_the_service_locked_down(units: list[Path]) -> None:
    """The threshold is 2.0 of 10; a service without hardening has 9.6."""
    security = ["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=20"]
    result = subprocess.run([*security, units[0]], capture_output=True, text=True, check=False)
    if "unrecognized option" in result.stderr:
        pytest.skip("this systemd-analyze has no --offline")
    assert result.returncode == 0, result.stdout


def test_stops_and_overlaps_of_the_service_are_not_failures() -> None:
    assert service()["Type"] == "oneshot"
    assert service()["SuccessExitStatus"].split() == ["5", "143"]
    assert (service()["KillMode"], service()["TimeoutStopSec"]) == ("mixed", "30")


# Kubernetes


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_the_manifests_follow_kubernetes_schema(version: str) -> None:
    for manifest in manifests():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_kubernetes_schema_finds_a_typo() -> None:
    cronjob = manifests()[1]
    cronjob["spec"]["concurencyPolicy"] = cronjob["spec"].pop("concurrencyPolicy")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(cronjob, KUBERNETES_VERSIONS[-1], strict=True)


def test_the_config_map_is_nightly_toml() -> None:
    assert manifests()[0]["data"] == {"nightly.toml": text_of("nightly.toml")}


def test_names_in_the_pod_exist() -> None:
    """A schema does not check names."""
    config_map, _ = manifests()
    (container,) = pod()["containers"]
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert sorted(volumes) == sorted(mount["name"] for mount in mounts.values())
    assert volumes["settings"]["configMap"]["name"] == config_map["metadata"]["name"]
    _, _, config, images, output = container["args"]
    writable = {path for path, mount in mounts.items() if not mount.get("readOnly")}
    assert {str(Path(config).parent), images} == set(mounts) - writable
    assert {str(Path(output).parent), "/tmp"} == writable


def test_pod_fits_the_dockerfile() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert pod()["containers"][0]["image"] == f"batchcap:{__version__}"
    assert f"\nUSER {pod()['securityContext']['runAsUser']}\n" in dockerfile
    (cache,) = re.findall(r"XDG_CACHE_HOME=(\S+)", dockerfile)
    assert cache.startswith("/tmp/")  # the only writable place beside the volumes


def test_pod_has_minimal_privileges() -> None:
    (container,) = pod()["containers"]
    assert pod()["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_kubernetes_retries_only_if_it_may_help() -> None:
    job = manifests()[1]["spec"]["jobTemplate"]["spec"]
    action_of = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {"values": []})["values"]
    }
    assert action_of == {143: "Ignore", 2: "FailJob", 3: "FailJob", 4: "FailJob"}
    names = {
        rule["onExitCodes"]["containerName"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert names == {pod()["containers"][0]["name"]}
    assert pod()["restartPolicy"] == "Never"  # required by podFailurePolicy
    assert pod()["terminationGracePeriodSeconds"] == 30


# Docker


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    hadolint = shutil.which("hadolint", path=places)
    assert hadolint, "hadolint comes with the extra test"
    result = subprocess.run(
        [hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
