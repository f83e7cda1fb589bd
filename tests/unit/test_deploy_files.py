"""What deploy/ has is right, as far as that can be said without Docker, Kubernetes and systemd running."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import typer
import yaml
from ray.scripts.scripts import cli as ray_cli

from modelpool.cli.app import app
from modelpool.settings import ENVIRONMENT, load

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OTHERS = {"HF_HOME", "CUDA_VISIBLE_DEVICES", "RAY_USAGE_STATS_ENABLED"}
"""Variables that are read by others: the hub's client, CUDA, Ray."""

Json = dict[str, Any]


def compose() -> Json:
    found: Json = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return found


def kubernetes() -> list[Json]:
    return list(yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text()))


def units() -> list[Path]:
    return sorted((DEPLOY / "systemd").glob("*.service"))


# ------------------------------------------------------------ names that are ours, or Ray's


def containers() -> Iterator[Json]:
    for manifest in kubernetes():
        spec = manifest["spec"]
        if manifest["kind"] == "RayCluster":
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                yield from group["template"]["spec"]["containers"]
        elif "template" in spec:
            yield from spec["template"]["spec"]["containers"]


def commands() -> Iterator[str]:
    """All that is run anywhere, as a shell has it."""
    for service in compose()["services"].values():
        command = service["command"]
        yield command if isinstance(command, str) else command[-1]
    yield from (shlex.join(each["command"]) for each in containers() if "command" in each)
    yield from (each["spec"]["entrypoint"] for each in kubernetes() if each["kind"] == "RayJob")
    yield from (
        unit.read_text().partition("ExecStart=/opt/modelpool/.venv/bin/")[2].splitlines()[0] for unit in units()
    )


def programs() -> set[tuple[str, ...]]:
    """The single programs of them, without variables and `exec` before them."""
    found = set()
    for command in commands():
        for part in command.split("&&"):
            words = [word for word in shlex.split(part) if not re.match(r"[A-Z_]+=", word)]
            found.add(tuple(words[words[0] == "exec" :]))
    return found


def environments() -> dict[str, dict[str, str]]:
    """Variables and their values, where a file gives one, by what they are for."""
    found = {f"compose {name}": dict(each["environment"]) for name, each in compose()["services"].items()}
    for number, container in enumerate(containers()):
        found[f"kubernetes {number}"] = {each["name"]: each.get("value", "") for each in container["env"]}
    lines = [line for line in (DEPLOY / "systemd" / "worker.env").read_text().splitlines() if not line.startswith("#")]
    found["systemd"] = dict(line.split("=", 1) for line in lines)
    image = re.search(r"^ENV (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert image is not None
    found["image"] = dict(each.split("=", 1) for each in image[1].split())
    return found


def test_all_that_is_run_is_a_command_with_options_that_it_has() -> None:
    ours = typer.main.get_group(app).commands
    seen = set()
    for program, *arguments in programs():
        seen.add(program)
        if program == "sleep":
            continue
        known = {"modelpool": ours, "ray": ray_cli.commands}[program]
        options = {option for parameter in known[arguments[0]].params for option in parameter.opts}
        assert {each.partition("=")[0] for each in arguments[1:]} <= options, (program, arguments)
    assert seen == {"modelpool", "ray", "sleep"}


@pytest.mark.parametrize("place", environments())
def test_every_variable_is_one_of_ours_and_takes_its_value(place: str) -> None:
    environ = environments()[place]
    assert environ
    assert set(environ) <= {variable for variable, _ in ENVIRONMENT} | OTHERS
    values = {name: "" if value.startswith("${") else value for name, value in environ.items()}
    settings = load(values)
    for variable, path in ENVIRONMENT:
        if values.get(variable):
            part, _, name = path.rpartition(".")
            value = getattr(getattr(settings, part) if part else settings, name)
            assert str(value).lower() == values[variable].lower()


# ------------------------------------------------------------ Docker


def test_the_compose_file_is_one_by_its_schema() -> None:
    """The schema is that of docker-compose 1.29.2, the latest that has it in a package."""
    schema = json.loads((ROOT / "tests" / "data" / "compose_spec.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(compose())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate({**compose(), "service": {}})


def test_the_compose_file_refers_to_what_it_has() -> None:
    services, volumes = compose()["services"], compose()["volumes"]
    assert set(services) == {"head", "gateway", "worker"}
    for name, service in services.items():
        assert set(service.get("depends_on", {})) < set(services)
        assert {each.partition(":")[0] for each in service["volumes"]} <= set(volumes)
        assert name in volumes, "a home of its own"
        assert service["healthcheck"]["test"][-1].endswith("/health")
    built = services["head"]["build"]
    assert (DEPLOY / built["context"] / built["dockerfile"]).resolve() == DEPLOY / "Dockerfile"
    assert services["worker"]["environment"]["MANAGER_URL"] == "http://gateway:8000"


def test_the_image_is_made_of_what_there_is() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    assert {step for step, _ in steps} <= {"FROM", "RUN", "ARG", "WORKDIR", "COPY", "USER", "ENV", "EXPOSE", "CMD"}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for source in (source for step, rest in steps if step == "COPY" for source in rest.split()[:-1]):
        assert (ROOT / source).exists()
        assert source not in ignored
    for engine in ("cpu", "gpu"):
        lock = (ROOT / "requirements" / f"{engine}.lock").read_text()
        assert re.search(r"^ray==", lock, re.MULTILINE)
    assert f"python:3.{sys.version_info.minor}" in steps[0][1] or "python:3.11" in steps[0][1]


# ------------------------------------------------------------ Kubernetes


def test_the_manifests_refer_to_what_they_have() -> None:
    by_name = {(each["kind"], each["metadata"]["name"]): each for each in kubernetes()}
    assert {kind for kind, _ in by_name} == {"RayCluster", "RayJob", "Service", "StatefulSet"}
    cluster, job = by_name["RayCluster", "modelpool"], by_name["RayJob", "modelpool-deploy"]
    assert cluster["apiVersion"] == job["apiVersion"] == "ray.io/v1"
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    nodes = [group["template"] for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"])]
    workers = by_name["StatefulSet", "modelpool-worker"]["spec"]
    assert workers["selector"]["matchLabels"] == workers["template"]["metadata"]["labels"]
    assert ("Service", workers["serviceName"]) in by_name
    assert by_name["Service", "modelpool-worker"]["spec"]["selector"] == workers["template"]["metadata"]["labels"]
    for node in nodes:
        assert by_name["Service", "modelpool"]["spec"]["selector"] == node["metadata"]["labels"]
    for name, pod in (("modelpool", nodes[0]), ("modelpool-worker", workers["template"])):
        (port,) = by_name["Service", name]["spec"]["ports"]
        (container,) = pod["spec"]["containers"]
        assert {each["name"]: each["containerPort"] for each in container["ports"]} == {
            port["targetPort"]: port["port"]
        }


def test_every_pod_has_the_volumes_that_it_mounts_and_the_one_image() -> None:
    for manifest in kubernetes():
        for pod in pods(manifest["spec"]):
            volumes = {each["name"] for each in pod["spec"]["volumes"]}
            volumes |= {each["metadata"]["name"] for each in manifest["spec"].get("volumeClaimTemplates", ())}
            for container in pod["spec"]["containers"]:
                assert {each["name"] for each in container["volumeMounts"]} == volumes
                assert container["image"] == compose()["services"]["head"]["image"]
    secrets = {
        each["valueFrom"]["secretKeyRef"]["key"]
        for container in containers()
        for each in container["env"]
        if "secretKeyRef" in each.get("valueFrom", {})
    }
    made = re.findall(r"--from-literal=([\w-]+)=", (DEPLOY / "kuberay.yaml").read_text())
    assert secrets == set(made)


def pods(spec: Json) -> Iterator[Json]:
    if "headGroupSpec" in spec:
        yield from (group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]))
    elif "template" in spec:
        yield spec["template"]


# ------------------------------------------------------------ systemd


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze comes with systemd")
@pytest.mark.parametrize("unit", units(), ids=lambda unit: unit.name)
def test_a_unit_is_one_by_systemds_own_word(unit: Path, tmp_path: Path) -> None:
    program = tmp_path / "modelpool"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = (
        unit.read_text()
        .replace("/opt/modelpool/.venv/bin/modelpool", str(program))
        .replace("User=modelpool", "User=root")
    )
    name = unit.name.replace("@", "@0")
    (tmp_path / name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", "--generators=no", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_unit_lets_a_drained_worker_go_and_gives_one_that_ends_its_time() -> None:
    for unit in units():
        lines = unit.read_text().splitlines()
        assert "Restart=on-failure" in lines
        assert "KillMode=mixed" in lines
