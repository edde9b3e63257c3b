"""The directories that commands are given."""

import json

from ray_trainer.checkpoint.catalog import open_storage
from ray_trainer.errors import ConfigError
from ray_trainer.storage import Storage

_SUMMARY = "sweep.json"


def open_run(place: str) -> Storage:
    """The directory of a run, or of something in it.

    Raises:
        ConfigError: it is that of a sweep; names the run that is probably meant.
    """
    run = open_storage(place)
    if run.exists(_SUMMARY):
        best = json.loads(run.read(_SUMMARY)).get("best")
        meant = f"That of its best trial is {run.uri}/trials/{best}." if best else f"Trials are in {run.uri}/trials."
        raise ConfigError(f"{run.uri} is the directory of a sweep, not of a run. {meant} {_SUMMARY} tells of all.")
    return run
