"""What the environment of the program says about where it runs."""

import os
from dataclasses import replace
from pathlib import Path

from ray_trainer.cli.runfile import RunFile
from ray_trainer.errors import ConfigError

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a job
_UNPACKED = "runtime_resources"  # the directory in which Ray unpacks a job's files


def in_ray_job() -> bool:
    """Whether Ray started this program as the driver of a job."""
    return _JOB in os.environ


def placed_in_job(run_file: RunFile) -> RunFile:
    """The run as it is meant inside of a Ray job: on the cluster that runs the job.

    Raises:
        ConfigError: it would be written to where Ray deletes it with the job.
    """
    if _UNPACKED in Path.cwd().parts:
        require_lasting_storage(run_file)
    cluster = run_file.cluster
    return replace(run_file, cluster=replace(cluster, address=cluster.address or "auto"))


def require_lasting_storage(run_file: RunFile) -> None:
    """Refuse a storage path that is relative to the unpacked files of a job.

    Raises:
        ConfigError: it is.
    """
    path = run_file.cluster.storage_path
    if "://" not in path and not Path(path).expanduser().is_absolute():
        raise ConfigError(
            f"cluster.storage_path = {path!r}: in a job a relative path lies among the job's own files, which Ray "
            "deletes. Name a URI such as s3://bucket/runs, or an absolute path that all nodes share."
        )
