"""What must be there before a run starts or writes anything: its storage, and the cluster at its address."""

import os
import socket

import ray
from pyarrow import fs as pafs

from ray_trainer.cluster.config import ClusterConfig
from ray_trainer.errors import ConfigError, RunError
from ray_trainer.storage import Storage
from ray_trainer.storage.faults import is_transient
from ray_trainer.storage.local import refuse_unwritable

CONNECT_TIMEOUT_S = 5.0

_BUCKETS = ("s3", "gcs")


def require_storage(run: Storage) -> None:
    """Refuse a place where nothing can be kept, as far as that can be seen without writing.

    Args:
        run: the directory of the run; a failure that may pass is waited for.

    Raises:
        ConfigError: it is missing, or these credentials or this user may not use it.
        RunError: an object store does not answer.
    """
    if run.is_local:
        refuse_unwritable(run.local_path(), "cluster.storage_path")
        return
    try:
        run.list()
        is_missing = _bucket_is_missing(run)
    except OSError as error:
        text = f"cluster.storage_path: {run.uri} cannot be used ({error})."
        if is_transient(error):
            raise RunError(f"{text} Nothing was started; give the same command again once it answers.") from error
        raise ConfigError(
            f"{text} Correct it, or the credentials: for s3:// in AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION "
            f"and AWS_ENDPOINT_URL. 'ray-trainer doctor --storage-path {run.uri}' tries it out."
        ) from error
    if is_missing:
        raise ConfigError(
            f"cluster.storage_path: {run.uri} is in a bucket that does not exist, {_bucket(run)!r}. Create it, or "
            "correct its name; with a server other than AWS also AWS_ENDPOINT_URL."
        )


def require_cluster(cluster: ClusterConfig) -> None:
    """Refuse an address where nobody listens; Ray itself would go on asking for many minutes.

    Raises:
        ConfigError: it does not answer within `CONNECT_TIMEOUT_S`.
    """
    if cluster.address is None or ray.is_initialized():
        return
    # as Ray reads it: "auto" is the address in the environment, else a Ray of this machine, which it finds at once
    address = os.environ.get("RAY_ADDRESS", "") if cluster.address == "auto" else cluster.address
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        at = f"{cluster.address!r} (RAY_ADDRESS = {address!r})" if cluster.address == "auto" else repr(address)
        raise ConfigError(
            f"cluster.address = {at}: nobody answers there ({error}). Give the host:port that 'ray start --head' "
            "prints, 'auto' on a node of the cluster, or leave it out to train on this machine."
        ) from error


def _bucket_is_missing(run: Storage) -> bool:
    """Whether that is certain: who may use a prefix only is not told about its bucket, and an empty one lists fine."""
    if run.filesystem.type_name not in _BUCKETS:
        return False
    try:
        return bool(run.filesystem.get_file_info(_bucket(run)).type == pafs.FileType.NotFound)
    except OSError:
        return False


def _bucket(run: Storage) -> str:
    return run.path.lstrip("/").partition("/")[0]
