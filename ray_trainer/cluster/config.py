"""Where a run trains: `ClusterConfig`. Does not import Ray."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ray_trainer.config import TrainingConfig
from ray_trainer.config.fields import Count, CountOrZero, NotNegative, Positive, Text, described
from ray_trainer.config.schema import Rule, Section

RunName = Annotated[
    str,
    Field(max_length=200),
    described(
        r"^[^./\\?#%\s\x00-\x1f\x7f]([^/\\?#%\x00-\x1f\x7f]*[^/\\?#%\s\x00-\x1f\x7f])?$",
        "a plain directory name of at most 200 characters, without / \\ ? # % and not starting with a dot",
    ),
]
Address = Annotated[
    str,
    described(r"^(auto|(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):[0-9]{1,5})$", "'auto' or the 'host:port' of a Ray cluster"),
]

_SYNONYMS = {
    "num_workers": "workers n_workers world_size num_processes num_nodes devices scale",
    "use_gpu": "gpu gpus num_gpus accelerator use_gpus",
    "resources_per_worker": "resources worker_resources resources_per_trial cpus_per_worker num_cpus",
    "name": "run_name experiment_name run",
    "storage_path": "storage output_dir storage_dir local_dir results_dir save_dir",
    "max_failures": "max_retries retries max_restarts num_retries",
    "address": "ray_address cluster_address head url",
    "placement_strategy": "strategy placement placement_group_strategy",
    "torch_threads_per_worker": "num_threads omp_num_threads threads_per_worker torch_threads",
    "snapshot_every_n_steps": "snapshot_interval memory_checkpoint_interval in_memory_checkpoint_every_n_steps",
    "in_job_recovery": "rejoin in_place_recovery elastic_recovery replace_workers",
    "spare_workers": "spares num_spares spare_nodes hot_spares warm_spares standby_workers",
    "collective_timeout_s": "timeout timeout_s torch_timeout nccl_timeout ddp_timeout collective_timeout",
    "hang_floor_s": "hang_timeout hang_timeout_s heartbeat_timeout watchdog_timeout hang_s",
}


def _reversed_range(config: "ClusterConfig") -> str | None:
    if isinstance(config.num_workers, tuple) and config.num_workers[0] > config.num_workers[1]:
        return "the least number of workers comes first, then the largest; swap them"
    return None


def _misspelt_resource(config: "ClusterConfig") -> str | None:
    for name in config.resources_per_worker or {}:
        if name.upper() in ("CPU", "GPU") and name != name.upper():
            return f"Ray would wait forever for a resource named {name!r}; write {name.upper()!r}"
        if not name:
            return "a resource without a name; name it, such as CPU"
    return None


def _gpus_disagree(config: "ClusterConfig") -> str | None:
    gpus = (config.resources_per_worker or {}).get("GPU")
    if gpus and not config.use_gpu:
        return "asks for GPUs while use_gpu is off; switch use_gpu on, or leave GPU out"
    if gpus == 0 and config.use_gpu:
        return "leaves no GPU to the workers while use_gpu is on; leave GPU out, or switch use_gpu off"
    return None


def _useless_spares(config: "ClusterConfig") -> str | None:
    if not config.spare_workers:
        return None
    if isinstance(config.num_workers, tuple):
        return "nothing would use them while num_workers is [least, most]; give one number, or leave spare_workers out"
    if config.num_workers == 1:
        return "a spare goes on with what another worker has, and there is one only; set num_workers to 2 or more"
    if config.use_gpu:
        return "with use_gpu all workers start again when one dies, so nothing would use them; leave spare_workers out"
    if not config.in_job_recovery:
        return "nothing would use them while in_job_recovery is off; switch it on, or leave spare_workers out"
    return None


@dataclass
class ClusterConfig(Section):
    """Where a run trains and what becomes of it there. Every setting has a default that works on a laptop."""

    num_workers: Count | tuple[Count, Count] = 1
    """Processes that train together, or [least, most] of them: the run then follows the cluster's size."""
    use_gpu: bool = False
    """Whether each worker gets a GPU."""
    resources_per_worker: dict[str, NotNegative] | None = None
    """What each worker reserves in Ray, such as {CPU: 2}. None: 1 CPU, and 1 GPU with `use_gpu`."""
    name: RunName | None = None
    """Name of the run and of its directory; the same name continues the run. None: one is derived."""
    storage_path: Text = "runs"
    """Directory, or URI, in which the directory of the run lies; every node must reach it."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Failures in a row, without a step of progress in between, after which the run ends as failed. -1: no limit."""
    address: Address | None = None
    """Ray cluster to join, "auto" or "host:port". None: a local Ray is started for this run."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Workers on as few nodes as possible (PACK) or as many (SPREAD); STRICT_ makes it a must."""
    torch_threads_per_worker: Count | None = None
    """CPU threads of torch in each worker. None: the CPUs that the worker reserves."""
    snapshot_every_n_steps: Count | None = None
    """Steps between snapshots in Ray's object store, from which workers that were restarted go on. None: none."""
    in_job_recovery: bool = True
    """Whether a worker that died is replaced alone, and the others keep process and state, so that no step is
    lost (with `determinism: elastic` they train on meanwhile); else all of them start again from the newest
    checkpoint. Always so with one worker, a range of workers, GPUs or FSDP."""
    spare_workers: CountOrZero = 0
    """Workers more that wait, with everything imported, for one of `num_workers` to die: one takes its place at once,
    and what Ray starts is the next spare. Each reserves the same as the others."""
    collective_timeout_s: Positive = 1800.0
    """Seconds that workers wait for each other before they take one for dead."""
    hang_floor_s: Positive | None = 10.0
    """Least seconds without a sign of life after which a worker may count as hung: its stacks are written, and it
    is replaced. What is usual for a phase of the training prolongs it. None: no hang is looked for."""

    other_names: ClassVar[Mapping[str, str]] = {
        theirs: ours for ours, names in _SYNONYMS.items() for theirs in names.split()
    }
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(("num_workers",), _reversed_range),
        Rule(("resources_per_worker",), _misspelt_resource),
        Rule(("resources_per_worker", "use_gpu"), _gpus_disagree),
        Rule(("spare_workers", "num_workers", "use_gpu", "in_job_recovery"), _useless_spares),
    )


def useless_with(training: TrainingConfig, cluster: ClusterConfig) -> str | None:
    """What is wrong with `spare_workers` in the light of the training, and what to do; None if nothing is."""
    if cluster.spare_workers and training.parallelism == "fsdp":
        return "with training.parallelism = 'fsdp' nothing would use them; leave spare_workers out"
    return None
