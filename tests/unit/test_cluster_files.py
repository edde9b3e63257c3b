"""The files in cluster/ are accepted by what reads them: Ray's own checks, linters, schemas and parsers."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import ray
import yaml
from kuberay import ClusterSpec, RayCluster, RayJob
from pydantic import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from ray_trainer.cli import _parser
from ray_trainer.cli.runfile import load_run_file
from ray_trainer.cluster.telemetry import METRICS
from ray_trainer.config.overrides import split_overrides

REPOSITORY = Path(__file__).parents[2]
FILES = REPOSITORY / "cluster"
RAY_UP = sorted((FILES / "ray-up").glob("*.yaml"))
IMAGE = re.compile(r"REGISTRY/ray-trainer:(\S+)")


def load(name: str) -> Any:
    return yaml.safe_load((FILES / name).read_text())


def run_tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A linter that pip has put beside this Python."""
    tool = Path(sys.executable).with_name(name)
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)


# ray up


def start_commands(config: dict[str, Any]) -> list[str]:
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_takes_the_file(path):
    config = prepare_config(yaml.safe_load(path.read_text()))

    validate_config(config)
    assert sum(kind["max_workers"] for kind in config["available_node_types"].values()) >= config["max_workers"] > 0


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_refuses_the_file_with_a_misspelt_field(path):
    config = prepare_config(yaml.safe_load(path.read_text()) | {"idle_timeout_minuts": 1})

    with pytest.raises(Exception, match="idle_timeout_minuts"):
        validate_config(config)


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_every_node_asks_for_the_token_that_it_is_given(path):
    config = yaml.safe_load(path.read_text())

    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert len(start_commands(config)) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in start_commands(config))


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_commands_of_the_nodes_are_sound_shell_with_options_that_ray_has(path):
    config = yaml.safe_load(path.read_text())
    commands = [command for name, value in config.items() if name.endswith("_commands") for command in value]

    checked = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "--shell=bash", "--exclude=SC2016,SC2088", "-"],
        input="\n".join(f"( {command} )" for command in commands),
        capture_output=True,
        text=True,
        check=False,
    )

    assert checked.returncode == 0, checked.stdout
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    used = {word.partition("=")[0] for command in start_commands(config) for word in shlex.split(command)}
    assert {word for word in used if word.startswith("--")} <= known


# KubeRay


def cluster_specs() -> Iterator[ClusterSpec]:
    yield RayJob.model_validate(load("kuberay/rayjob.yaml")).spec.rayClusterSpec
    yield RayCluster.model_validate(load("kuberay/raycluster.yaml")).spec


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}


def validate_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_manifests_are_of_kuberays_form_and_both_clusters_the_same():
    one, other = cluster_specs()

    assert one == other
    assert one.rayVersion == ray.__version__


def test_pods_are_of_kubernetes_form():
    spec = next(cluster_specs())
    for template in spec.templates():
        validate_kubernetes(as_pod(template))

    container = spec.templates()[1]["spec"]["containers"][0]
    container["imagee"] = container.pop("image")
    with pytest.raises(kubernetes_validate.ValidationError, match="imagee"):
        validate_kubernetes(as_pod(spec.templates()[1]))


def test_redis_is_of_kubernetes_form_and_is_what_the_clusters_ask_for():
    service, server = yaml.safe_load_all((FILES / "kuberay/redis.yaml").read_text())
    for document in (service, server):
        validate_kubernetes(document)

    asked = next(cluster_specs()).gcsFaultToleranceOptions
    host, port = asked.redisAddress.removeprefix("redis://").split(":")
    assert (host, int(port)) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])
    assert service["spec"]["selector"].items() <= server["spec"]["template"]["metadata"]["labels"].items()
    key = server["spec"]["template"]["spec"]["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"]
    assert key == asked.redisPassword.valueFrom.secretKeyRef.model_dump()


def test_manifest_with_a_misspelt_field_is_refused():
    manifest = load("kuberay/rayjob.yaml")
    manifest["spec"]["backofLimit"] = manifest["spec"].pop("backoffLimit")

    with pytest.raises(ValidationError, match="backofLimit"):
        RayJob.model_validate(manifest)


def test_every_retry_of_the_rayjob_is_the_same_run_and_its_driver_is_not_on_the_head():
    spec = RayJob.model_validate(load("kuberay/rayjob.yaml")).spec

    python, flag, module, command, path, *overrides = shlex.split(spec.entrypoint)
    assert [python, flag, module, command] == ["python", "-m", "ray_trainer", "train"]
    workdir = re.search(r"^WORKDIR (\S+)$", (FILES / "docker/Dockerfile").read_text(), re.MULTILINE)
    assert workdir is not None
    run_file = load_run_file(REPOSITORY / Path(path).relative_to(workdir[1]), split_overrides(overrides)[1])
    assert run_file.cluster.name is not None
    assert "://" in run_file.cluster.storage_path
    assert spec.backoffLimit > 0
    assert (spec.rayClusterSpec.headGroupSpec.rayStartParams["num-cpus"], spec.entrypointNumCpus) == ("0", 1)
    workers = spec.rayClusterSpec.workerGroupSpecs[0]
    cpus = int(workers.template["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert workers.maxReplicas * cpus >= run_file.cluster.num_workers + spec.entrypointNumCpus


def test_prometheus_of_kubernetes_reads_a_port_that_all_pods_have():
    monitor = load("kuberay/podmonitor.yaml")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]

    for spec in cluster_specs():
        for template in spec.templates():
            ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
            assert endpoint["port"] in ports
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "ray"}]  # as in prometheus.yml


# the image


def test_hadolint_finds_nothing_in_the_dockerfile():
    checked = run_tool("hadolint", FILES / "docker/Dockerfile")

    assert checked.returncode == 0, checked.stdout


def test_image_is_of_this_version_with_the_pinned_set_and_only_files_that_there_are():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    text = (FILES / "docker/Dockerfile").read_text()
    let_through = (FILES / "docker/Dockerfile.dockerignore").read_text().splitlines()

    assert "--constraint cluster/constraints.txt" in text
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in line.split():
            assert (REPOSITORY / source).exists(), source
            assert f"!{source}" in let_through
    named = [name for path in FILES.rglob("*") if path.is_file() for name in IMAGE.findall(path.read_text())]
    assert set(named) == {project["version"]}


# Prometheus and Grafana


def rays_own_metrics() -> set[str]:
    """Those that Ray's own dashboards ask for."""
    folder = Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards"
    return set(re.findall(r"\bray_\w+", "".join(path.read_text() for path in folder.glob("*.py"))))


def alerts() -> list[dict[str, Any]]:
    return [rule for group in load("monitoring/alerts.yml")["groups"] for rule in group["rules"]]


def selectors(expression: Any) -> Iterator[Any]:
    """The metrics that a parsed query asks for."""
    if isinstance(expression, promql_parser.VectorSelector):
        yield expression
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        if (part := getattr(expression, name, None)) is not None:
            yield from selectors(part)
    for argument in getattr(expression, "args", ()):
        yield from selectors(argument)


def test_alerts_are_queries_of_metrics_that_there_are():
    known = rays_own_metrics() | {f"ray_{name}" for name in METRICS} | {"up"}
    for alert in alerts():
        asked = {selector.name for selector in selectors(promql_parser.parse(alert["expr"]))}
        assert asked, alert["alert"]
        assert asked <= known


def test_every_alert_has_a_name_of_its_own_and_says_what_to_do():
    assert len({alert["alert"] for alert in alerts()}) == len(alerts())
    for alert in alerts():
        assert alert.keys() - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert alert["annotations"].keys() == {"summary", "action"}
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert promql_parser.parse_duration(alert.get("for", "1s")).total_seconds() > 0
        label = "run" if "ray_trainer_" in alert["expr"] else "instance"
        assert f"$labels.{label} " in alert["annotations"]["summary"]


def test_queries_of_the_dashboard_parse():
    dashboard = json.loads((FILES / "grafana-dashboard.json").read_text())

    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            assert list(selectors(promql_parser.parse(target["expr"])))


def test_prometheus_finds_its_rules_and_the_nodes_where_ray_writes_them():
    config = load("monitoring/prometheus.yml")

    assert all((FILES / "monitoring" / name).is_file() for name in config["rule_files"])
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [
        f"/tmp/ray/{ray._private.ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE}"
    ]
    assert job["job_name"] == "ray"  # the alert on `up` asks for it


def test_grafana_is_given_a_prometheus_and_a_folder_of_dashboards():
    (source,) = load("monitoring/grafana-datasource.yml")["datasources"]
    (provider,) = load("monitoring/grafana-dashboards.yml")["providers"]

    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    assert (provider["type"], list(provider["options"])) == ("file", ["path"])


# what the files tell people to type


def commands_told() -> list[str]:
    """The lines with ``ray-trainer`` in comments and in the README."""
    texts = [path.read_text() for path in sorted(FILES.rglob("*")) if path.is_file()]
    text = "\n".join(texts).replace("\\\n", " ")
    return re.findall(r"^(?:#\s+|\$ )?(?:[A-Z_]+=\S+ )*(ray-trainer [^\n#`]+)", text, re.MULTILINE)


def test_commands_that_are_told_are_commands():
    assert len(commands_told()) > 3
    for line in commands_told():
        others, overrides = split_overrides(shlex.split(line)[1:])
        args = _parser().parse_args(others)
        if "run_file" in args and args.run_file is not None:
            load_run_file(REPOSITORY / args.run_file, overrides)
