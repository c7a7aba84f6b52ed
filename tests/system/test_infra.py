"""The files under infra/: every one is checked as far as it can be without an engine or a
cluster."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from populace.configs.load import load_settings

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
BIN = Path(sys.executable).parent
README = (INFRA / "README.md").read_text()


def load(name: str) -> Any:
    return yaml.safe_load((INFRA / name).read_text())


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


# The image


def instructions() -> list[list[str]]:
    """The Dockerfile's instructions, each with its arguments."""
    text = re.sub(r"^\s*#.*\n", "", (INFRA / "docker/Dockerfile").read_text(), flags=re.MULTILINE)
    return [line.split() for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def copied() -> list[tuple[str, str]]:
    """(path in the repository, folder in the image) of every COPY."""
    arguments = [found[1:] for found in instructions() if found[0] == "COPY"]
    return [
        (source, words[-1])
        for words in arguments
        for source in words[:-1]
        if not source.startswith("--")
    ]


def is_sent_to_docker(path: str) -> bool:
    """Whether .dockerignore lets `path` through: the last pattern that names it, or a folder it is
    in, decides."""
    sent = True
    parents = [path, *(str(parent) for parent in Path(path).parents if parent.name)]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            names = [Path(name).name for name in parents] if "**/" in line else parents
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                sent = line.startswith("!")
    return sent


def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    found = run(BIN / "hadolint", INFRA / "docker/Dockerfile")
    assert (found.returncode, found.stdout) == (0, "")


def test_everything_that_the_image_copies_is_there_and_reaches_docker() -> None:
    sources = [source for source, _ in copied()]
    assert "population" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent_to_docker(source), source


@pytest.mark.parametrize(
    "path", [".git", ".venv/bin/ray", "build", "docs", "infra/.env", "infra/secrets/ray_token"]
)
def test_nothing_big_or_secret_reaches_docker(path: str) -> None:
    assert not is_sent_to_docker(path)


def test_what_the_image_copies_is_enough_to_build_populace(tmp_path: Path) -> None:
    for source, target in copied():
        if (ROOT / source).is_dir():
            shutil.copytree(
                ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / source, tmp_path)
    wheel = run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        tmp_path,
    )
    assert wheel.returncode == 0, wheel.stderr
    names = run(sys.executable, "-m", "zipfile", "-l", *tmp_path.glob("populace-*.whl")).stdout
    for name in (
        "population/cli/app.py",
        "kernels/",
        "storage/",
        "workers/",
        "configs/tiny.yaml",
        "configs/bases/",
    ):
        assert f"populace/{name}" in names, name


def test_the_image_installs_the_dependencies_of_pyproject_and_of_the_extras_it_asks_for(
    tmp_path: Path,
) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    script = [sys.executable, str(INFRA / "docker/requirements.py"), "deepspeed"]
    lines = subprocess.run(
        script, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line for line in lines if line.startswith(("ray[", "deepspeed"))] == [
        "ray[default,serve]>=2.60",
        "deepspeed>=0.19",
    ]


def test_the_image_runs_as_a_user_that_kubernetes_knows_not_to_be_root() -> None:
    (user,) = [found[1] for found in instructions() if found[0] == "USER"]
    assert user == str(pods("raycluster.yaml")["head"]["spec"]["securityContext"]["runAsUser"])


# Compose


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_a_compose_file_follows_the_specification(name: str) -> None:
    schema = resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    jsonschema.validate(load(name), json.loads(schema.read_text()))


def test_a_machine_with_gpus_adds_an_image_and_the_cards_to_services_that_are_there() -> None:
    plain, more = load("compose.yaml")["services"], load("compose.gpu.yaml")["services"]
    assert more.keys() <= plain.keys()
    images = {name for name, service in plain.items() if service["image"].startswith("populace:")}
    assert more.keys() == images, "nobody keeps the image for CPUs"
    build = {**plain["ray"]["build"], "args": more["ray"]["build"].pop("args")}
    assert build == {**more["ray"]["build"], "args": build["args"]}
    assert list(build["args"]) == ["TORCH_INDEX"] and build["args"]["TORCH_INDEX"].endswith("cu130")
    (card,) = more["ray"]["deploy"]["resources"]["reservations"]["devices"]
    assert (card["count"], card["capabilities"]) == ("all", ["gpu"])


def mounts_of(service: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for volume in service.get("volumes", []):
        source, target, *_ = volume.split(":")
        yield source, target


def test_compose_mounts_only_files_that_are_there_and_volumes_that_are_declared() -> None:
    compose = load("compose.yaml")
    mounted = [
        source for service in compose["services"].values() for source, _ in mounts_of(service)
    ]
    files = [source for source in mounted if source.startswith(".")]
    assert len(files) >= 4
    for file in files:
        assert (INFRA / file).exists(), file
    assert {source for source in mounted if not source.startswith(".")} == set(compose["volumes"])


def test_every_variable_of_compose_stands_in_the_example_and_no_other() -> None:
    used = set(re.findall(r"\$\{(\w+)", (INFRA / "compose.yaml").read_text()))
    given = set(re.findall(r"^(\w+)=", (INFRA / ".env.example").read_text(), flags=re.MULTILINE))
    assert used == given


def test_no_password_comes_with_the_example() -> None:
    given = dict(
        re.findall(r"^(\w+)=(.*)$", (INFRA / ".env.example").read_text(), flags=re.MULTILINE)
    )
    assert {name for name, value in given.items() if not value} == {
        "MINIO_ROOT_PASSWORD",
        "GRAFANA_ADMIN_PASSWORD",
    }


def test_compose_publishes_ports_on_loopback_only() -> None:
    ports = [
        port
        for service in load("compose.yaml")["services"].values()
        for port in service.get("ports", [])
    ]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_every_image_of_compose_has_a_version_and_what_keeps_running_a_health_check() -> None:
    for name, service in load("compose.yaml")["services"].items():
        assert not service["image"].endswith(":latest")
        assert re.search(r":[\w.-]*\d", service["image"]), name
        assert ("healthcheck" in service) == (service.get("restart") == "unless-stopped"), name


def test_the_readme_makes_the_secrets_that_compose_reads_and_git_ignores_them() -> None:
    for secret in load("compose.yaml")["secrets"].values():
        path = "infra/" + secret["file"].removeprefix("./")
        assert f"> {path}" in README
        assert run("git", "-C", ROOT, "check-ignore", path).returncode == 0
    assert run("git", "-C", ROOT, "check-ignore", "infra/.env").returncode == 0


# Prometheus and Grafana


def test_promtool_accepts_the_configuration_and_its_rules(tmp_path: Path) -> None:
    text = (INFRA / "prometheus/prometheus.yaml").read_text()
    rules = INFRA / "prometheus/rules.yaml"
    assert rules.exists()
    assert "/etc/prometheus/rules.yaml" in text
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    (tmp_path / "prometheus.yaml").write_text(
        text.replace("/etc/prometheus/rules.yaml", str(rules))
    )
    found = run(promtool, "check", "config", tmp_path / "prometheus.yaml")
    assert found.returncode == 0, found.stdout + found.stderr


def test_prometheus_and_grafana_read_from_paths_that_compose_mounts() -> None:
    services = load("compose.yaml")["services"]
    mounts = {
        name: dict((target, source) for source, target in mounts_of(services[name]))
        for name in services
    }
    (job,) = load("prometheus/prometheus.yaml")["scrape_configs"]
    (targets,) = job["file_sd_configs"][0]["files"]
    assert (
        mounts["ray"]["/tmp/ray"]
        == mounts["prometheus"]["/tmp/ray"]
        == mounts["grafana"]["/tmp/ray"]
        == "ray"
    )
    assert Path(targets).parent == Path("/tmp/ray")
    assert mounts["prometheus"]["/etc/prometheus/rules.yaml"] == "./prometheus/rules.yaml"
    provided = {provider["name"]: provider["options"]["path"] for provider in dashboards()}
    assert mounts["grafana"][provided["Populace"] + "/populace.json"] == "./grafana/populace.json"
    assert provided["Ray"].startswith("/tmp/ray/session_latest/")
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in mounts["grafana"]


def dashboards() -> list[dict[str, Any]]:
    providers: list[dict[str, Any]] = load("grafana/provisioning/dashboards/populace.yaml")[
        "providers"
    ]
    return providers


def test_rays_file_names_are_those_that_this_ray_writes() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE, SESSION_LATEST

    (job,) = load("prometheus/prometheus.yaml")["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    (ray,) = [provider for provider in dashboards() if provider["name"] == "Ray"]
    assert ray["options"]["path"] == f"/tmp/ray/{SESSION_LATEST}/metrics/grafana/dashboards"


def test_rays_dashboards_and_populaces_share_no_uid_and_one_data_source() -> None:
    from ray.dashboard.modules.metrics import grafana_dashboard_factory as factory

    rays = {
        make()[1]
        for name, make in [*vars(factory).items()]
        if re.fullmatch(r"generate_\w+_grafana_dashboard", name)
    }
    assert "rayDefaultDashboard" in rays
    assert json.loads((INFRA / "grafana/populace.json").read_text())["uid"] not in rays
    environment = load("compose.yaml")["services"]["ray"]["environment"]
    assert not [name for name in environment if name.endswith("DASHBOARD_UID")]
    (source,) = load("grafana/provisioning/datasources/populace.yaml")["datasources"]
    assert source["name"] == environment["RAY_PROMETHEUS_NAME"]
    assert source["url"] == environment["RAY_PROMETHEUS_HOST"]


# KubeRay


def an_object(required: list[str], **fields: Any) -> dict[str, Any]:
    """Exactly these fields: a misspelt one must not pass."""
    return {
        "type": "object",
        "properties": fields,
        "required": required,
        "additionalProperties": False,
    }


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
TEXT, COUNT, POD = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "object"}
METADATA = an_object(
    ["name"], name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}, labels=TEXTS
)
CLUSTER = an_object(
    ["rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"],
    rayVersion=TEXT,
    authOptions=an_object(["mode", "secretName"], mode={"enum": ["token"]}, secretName=TEXT),
    headGroupSpec=an_object(
        ["rayStartParams", "template"],
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        rayStartParams=TEXTS,
        template=POD,
    ),
    workerGroupSpecs={
        "type": "array",
        "items": an_object(
            ["groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"],
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS,
            template=POD,
        ),
    },
)
JOB = an_object(
    ["entrypoint", "rayClusterSpec", "shutdownAfterJobFinishes"],
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    backoffLimit=COUNT,
    submitterConfig=an_object(["backoffLimit"], backoffLimit=COUNT),
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    submitterPodTemplate=POD,
    rayClusterSpec=CLUSTER,
)
ENDPOINT = an_object(
    ["port"],
    port=TEXT,
    interval={"type": "string", "pattern": r"^\d+s$"},
    relabelings={
        "type": "array",
        "items": an_object(
            ["targetLabel"],
            targetLabel=TEXT,
            replacement=TEXT,
            sourceLabels={"type": "array", "items": TEXT},
        ),
    },
)
MONITOR = an_object(
    ["selector", "podMetricsEndpoints"],
    selector=an_object(["matchLabels"], matchLabels=TEXTS),
    podMetricsEndpoints={"type": "array", "items": ENDPOINT},
)
KINDS = {
    "raycluster.yaml": ("ray.io/v1", "RayCluster", CLUSTER),
    "rayjob.yaml": ("ray.io/v1", "RayJob", JOB),
    "podmonitor.yaml": ("monitoring.coreos.com/v1", "PodMonitor", MONITOR),
}


def cluster_of(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = load(f"kuberay/{name}")["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> dict[str, dict[str, Any]]:
    """The pod templates of a cluster or job, by what they are for."""
    cluster = cluster_of(name)
    found = {"head": cluster["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    submitter = load(f"kuberay/{name}")["spec"].get("submitterPodTemplate")
    return found | ({"submitter": submitter} if submitter else {})


TEMPLATES = [
    (name, role)
    for name in ("raycluster.yaml", "rayjob.yaml")
    for role in ("head", "cpu", "gpu", "submitter")
    if (name, role) != ("raycluster.yaml", "submitter")
]


@pytest.mark.parametrize("name", KINDS)
def test_a_resource_has_only_fields_that_its_operator_knows(name: str) -> None:
    version, kind, spec = KINDS[name]
    fields = {
        "apiVersion": {"const": version},
        "kind": {"const": kind},
        "metadata": METADATA,
        "spec": spec,
    }
    jsonschema.validate(load(f"kuberay/{name}"), an_object(list(fields), **fields))


@pytest.mark.parametrize(("name", "role"), TEMPLATES)
def test_a_pod_template_is_a_pod_that_kubernetes_accepts(name: str, role: str) -> None:
    template = pods(name)[role]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": role, **template.get("metadata", {})},
    }
    kubernetes_validate.validate(
        {**pod, "spec": template["spec"]}, kubernetes_validate.latest_version(), strict=True
    )


@pytest.mark.parametrize(("name", "role"), TEMPLATES)
def test_a_pod_has_no_more_rights_than_it_needs(name: str, role: str) -> None:
    spec = pods(name)[role]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(container["resources"]) == {"requests", "limits"}


@pytest.mark.parametrize(("name", "role"), TEMPLATES)
def test_mounts_of_a_pod_name_its_volumes(name: str, role: str) -> None:
    spec = pods(name)[role]["spec"]
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    containers = [*spec.get("initContainers", []), *spec["containers"]]
    assert {
        mount["name"] for container in containers for mount in container.get("volumeMounts", [])
    } == volumes


def secrets_of(template: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Variable -> (Secret, key)."""
    variables = [
        variable
        for container in template["spec"]["containers"]
        for variable in container.get("env", [])
    ]
    references = {
        item["name"]: item["valueFrom"]["secretKeyRef"] for item in variables if "valueFrom" in item
    }
    return {name: (reference["name"], reference["key"]) for name, reference in references.items()}


def secrets_of_the_readme() -> set[tuple[str, str]]:
    """(Secret, key) of every `kubectl create secret generic` in README.md."""
    made = set()
    for command in README.replace("\\\n", " ").splitlines():
        if command.startswith("kubectl create secret generic "):
            words = shlex.split(command)
            made |= {
                (words[4], word.split("=")[1])
                for word in words
                if word.startswith(("--from-literal", "--from-file"))
            }
    return made


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_pods_use_the_secrets_that_the_readme_makes_and_only_the_head_can_sign(name: str) -> None:
    found = {role: secrets_of(template) for role, template in pods(name).items()}
    assert {
        pair for secrets in found.values() for pair in secrets.values()
    } == secrets_of_the_readme()
    everywhere = {
        "RAY_AUTH_TOKEN",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "POPULACE_MASTER_KEY",
    }
    assert set(found["head"]) == {*everywhere, "POPULACE_SIGNING_KEY"}
    assert set(found["cpu"]) == set(found["gpu"]) == everywhere
    assert found["head"]["RAY_AUTH_TOKEN"] == (
        cluster_of(name)["authOptions"]["secretName"],
        "auth_token",
    )


def test_the_jobs_cluster_is_the_cluster_that_stays() -> None:
    assert cluster_of("rayjob.yaml") == cluster_of("raycluster.yaml")


def test_the_cluster_runs_the_version_of_ray_that_the_image_installs() -> None:
    assert (
        f"ray=={cluster_of('raycluster.yaml')['rayVersion']}\n"
        in (ROOT / "constraints.txt").read_text()
    )


def test_the_job_trains_with_settings_that_exist_on_the_store_and_the_pods_of_its_cluster() -> None:
    command, subcommand, config, *overrides = shlex.split(
        load("kuberay/rayjob.yaml")["spec"]["entrypoint"]
    )
    assert (command, subcommand) == ("populace", "run")
    settings = load_settings(ROOT / config, overrides)
    (group,) = [
        group
        for group in cluster_of("rayjob.yaml")["workerGroupSpecs"]
        if group["groupName"] == "cpu"
    ]
    (worker,) = group["template"]["spec"]["containers"]
    assert settings.shard.count == group["replicas"]
    assert settings.shard.cpus == settings.run.threads == int(worker["resources"]["limits"]["cpu"])
    for role in ("head", "cpu", "gpu"):
        variables = {
            item["name"]: item.get("value")
            for item in pods("rayjob.yaml")[role]["spec"]["containers"][0]["env"]
        }
        assert variables["POPULACE_STORE"] == settings.store


def test_the_monitor_finds_every_ray_pod_by_its_labels_and_ports() -> None:
    monitor = load("kuberay/podmonitor.yaml")["spec"]
    ours = {
        key: value
        for key, value in monitor["selector"]["matchLabels"].items()
        if not key.startswith("ray.io/")
    }
    endpoints = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    assert ours
    for role in ("head", "cpu", "gpu"):
        template = pods("raycluster.yaml")[role]
        ports = {
            port["name"]: port["containerPort"]
            for port in template["spec"]["containers"][0]["ports"]
        }
        assert ours.items() <= template["metadata"]["labels"].items()
        assert ports["metrics"] == 8080
        assert endpoints <= ports.keys() or role != "head"


# Jobs


def test_the_runtime_environment_is_one_for_ray_and_shows_no_key() -> None:
    from ray.runtime_env import RuntimeEnv

    environment = load("ray/runtime_env.yaml")
    RuntimeEnv(**environment)
    assert set(environment["env_vars"]) == {"POPULACE_STORE"}
    assert {"/build/", "/.venv/", "/.git/", "/infra/.env", "/infra/secrets/"} <= set(
        environment["excludes"]
    )
