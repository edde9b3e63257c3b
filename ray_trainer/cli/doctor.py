"""``ray-trainer doctor``: what is wrong with this machine, the storage or the cluster, and what to do."""

import argparse
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

from ray_trainer.cli import diagnosis
from ray_trainer.cli.commands import Subparsers, add_command
from ray_trainer.cli.diagnosis import Finding
from ray_trainer.cli.output import print_json, print_table
from ray_trainer.cli.runfile import load_run_file
from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.errors import ConfigError, RayTrainerError
from ray_trainer.storage import Storage

_STYLES = {"ok": "green", "note": "yellow", "wrong": "bold red"}


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add ``doctor``."""
    parser = add_command(
        subparsers,
        "doctor",
        help="say what is wrong with this machine, the storage or the cluster, and what to do",
        examples="""
            ray-trainer doctor
            ray-trainer doctor examples/digits.yaml
            ray-trainer doctor --storage-path /tmp/ray-trainer --json
            ray-trainer doctor --address auto
        """,
        usage="[RUN.yaml] [--address ADDRESS] [--storage-path PATH] [--json] [section.key=value ...]",
    )
    parser.add_argument(
        "run_file", metavar="RUN.yaml", type=Path, nargs="?", help="asks about the cluster and storage that it names"
    )
    parser.add_argument("--address", help="of a cluster: auto or host:port, to ask each node; or its dashboard's URL")
    parser.add_argument("--storage-path", metavar="PATH", help="directory or URI for runs; runs by default")
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``doctor``; 1 if something is wrong.

    Raises:
        ConfigError: the run file is wrong.
    """
    cluster = ClusterConfig() if args.run_file is None else load_run_file(args.run_file, args.overrides).cluster
    url = args.address if args.address and "://" in args.address else None
    cluster = replace(
        cluster,
        address=cluster.address if url else args.address or cluster.address,
        storage_path=args.storage_path or cluster.storage_path,
    )
    cluster.validate()
    findings = [*machine(), *diagnosis.storage(cluster.storage_path)]
    if url:
        findings.append(dashboard(url))
    if cluster.address:
        findings += nodes(cluster)
    elif not url:
        findings.append(Finding("cluster", "ok", "none was asked about; --address auto asks the one on this machine"))
    if args.json:
        print_json([asdict(finding) for finding in findings])
    else:
        _show(findings)
    return 1 if any(finding.state == "wrong" for finding in findings) else 0


def machine() -> Iterator[Finding]:
    """This machine and this Python."""
    yield from diagnosis.packages(metadata.requires("ray-trainer") or ())
    yield from diagnosis.processors(os.cpu_count(), len(os.sched_getaffinity(0)), diagnosis.cpu_quota(), os.environ)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    yield diagnosis.shared_memory("this machine", shared, memory)
    temporary = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    usage = shutil.disk_usage(temporary)
    yield diagnosis.temporary_space(temporary, usage.total, usage.free)
    yield diagnosis.authentication(os.environ, Path.home())


def dashboard(url: str) -> Finding:
    """Whether jobs can be submitted."""
    from ray_trainer.cluster import jobs  # late: without a cluster nothing of Ray is needed

    try:
        jobs.connect(url).list_jobs()
    except (RayTrainerError, OSError, RuntimeError) as error:
        return Finding("dashboard", "wrong", str(error), "check the address and RAY_AUTH_MODE")
    return Finding("dashboard", "ok", f"{url} takes jobs")


def nodes(cluster: ClusterConfig) -> list[Finding]:
    """Each node of a cluster: reached, versions, clock, shared memory, and that all see the same storage."""
    from ray_trainer.cluster.checkup import StorageProbe, examine_cluster

    place = Storage.open(cluster.storage_path).impatient()
    location = place.uri if place.is_local else cluster.storage_path
    folder = f".doctor-{uuid.uuid4().hex[:8]}"
    probe = StorageProbe(location, f"{folder}/driver", uuid.uuid4().hex)
    try:
        place.write(probe.name, probe.text.encode())
        facts = examine_cluster(cluster, probe)
        written = place.child(folder).list()
    except ConfigError as error:
        return [Finding("cluster", "wrong", str(error), "start the cluster, or correct the address or the token")]
    except OSError as error:
        return [Finding("cluster", "wrong", f"not asked, because {location} cannot be used: {error}", "see storage")]
    finally:
        with suppress(OSError):
            place.delete(folder)
    findings = [Finding("cluster", "ok", f"{cluster.address}: {len(facts.nodes)} node(s)")]
    if facts.missing:
        findings.append(Finding("resources", "wrong", facts.missing, "start more nodes, or ask for less"))
    for number, node in enumerate(facts.nodes):
        findings += diagnosis.node(node, is_seen=f"driver.{number}" in written, installed=_version)
    return findings


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _show(findings: Iterable[Finding]) -> None:
    rows: list[tuple[str, str, str]] = []
    for finding in findings:
        rows.append((finding.state, finding.subject, finding.text))
        if finding.advice:
            rows.append(("", "", f"What to do: {finding.advice}"))
    print_table(("", "subject", "found"), rows, _STYLES)
