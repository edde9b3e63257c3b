"""``ray-trainer submit``: ``ray-trainer train`` as a job on a cluster, through Ray's Jobs API."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ray_trainer.cli.commands import Subparsers, add_command
from ray_trainer.cli.experiment import load_experiment
from ray_trainer.cli.runfile import RunFile, load_run_file
from ray_trainer.cli.surroundings import require_lasting_storage
from ray_trainer.cluster.working_dir import PackedFile, biggest, packed_files, readable_size
from ray_trainer.config.documents import read_document
from ray_trainer.errors import ConfigError
from ray_trainer.runtime import Stop

if TYPE_CHECKING:
    from ray_trainer.cluster.jobs import JobRequest, Submission

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_OURS = ("working_dir",)
_DESCRIPTION = """\
Runs 'ray-trainer train RUN.yaml' as a job on a cluster and shows its log; ends with the exit code of the training.

What goes along: the files of the working directory, without what .gitignore and .rayignore name, runs/, .git/,
virtual environments and caches; at most 100 MiB once compressed. What is pinned: these files and this version of
ray_trainer, by content, and RAY_JOB_STOP_WAIT_TIME_S=600, so that a job that is stopped has the time to save.
Libraries are those of the cluster; --runtime-env adds pip or uv packages, variables or an image in Ray's own terms.

The same command again follows the job while it runs, and continues its run once it has ended. Ctrl-C stops the job
and waits for its checkpoint; a second Ctrl-C does not wait.
"""
_EXAMPLES = """
ray-trainer submit examples/digits.yaml --address http://127.0.0.1:8265 cluster.storage_path=/tmp/ray-trainer
ray-trainer submit examples/digits.yaml --no-wait cluster.storage_path=/tmp/ray-trainer
"""


def add_parser(subparsers: "Subparsers[argparse.ArgumentParser]") -> None:
    """Add ``submit``."""
    parser = add_command(
        subparsers,
        "submit",
        help="train as a job on a Ray cluster: sends the files, shows the log",
        examples=_EXAMPLES,
        usage="RUN.yaml [--address URL] [options] [section.key=value ...]",
    )
    parser.description = _DESCRIPTION
    parser.add_argument("run_file", metavar="RUN.yaml", type=Path, help="the run file, inside the working directory")
    parser.add_argument(
        "--address",
        metavar="URL",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS),
        help=f"of the cluster's dashboard; $RAY_API_SERVER_ADDRESS or {DEFAULT_ADDRESS} by default",
    )
    parser.add_argument("--name", help="of the job, its submission id; the run's name by default")
    parser.add_argument("--no-wait", action="store_true", help="end once the job is submitted")
    parser.add_argument("--working-dir", metavar="DIR", type=Path, default=Path(), help="what is sent; . by default")
    parser.add_argument("--runtime-env", metavar="FILE", type=Path, help="YAML file with more of Ray's runtime_env")
    parser.add_argument("--python", default="python", help="the Python of the cluster that trains; python by default")
    parser.add_argument(
        "--driver-cpus",
        metavar="N",
        type=float,
        default=0.0,
        help="CPUs reserved for the driver: it then runs on a node that has them, and outlives a head without CPUs "
        "that is lost and started again; on the head by default",
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent and run; submit nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out ``submit``.

    Raises:
        ConfigError: the run file, the experiment, the working directory or the address is wrong.
        RunError: the cluster does not answer.
    """
    run_file = load_run_file(args.run_file, args.overrides)
    require_lasting_storage(run_file)
    load_experiment(run_file.experiment, args.run_file.parent)
    working_dir = args.working_dir.resolve()
    _require_packed(working_dir, args.run_file, run_file)
    if args.dry_run:
        _show_files(packed_files(working_dir))
        print(f"runs {_entrypoint(args, working_dir)}")
        return 0
    from ray_trainer.cluster import jobs  # late: --help and --dry-run start faster without Ray
    from ray_trainer.cluster.job_following import follow

    with _wishes() as wish:
        client = jobs.connect(args.address)
        submission = jobs.submit(client, _request(args, run_file, working_dir))
        _tell(submission, args)
        if args.no_wait:
            return 0
        end = follow(client, submission.id, _write, wish)
    if end.exit_code:
        _say(f"Job {submission.id} ended with exit code {end.exit_code}. {end.reason}".rstrip())
        _say(end.advice)
    return end.exit_code


def _request(args: argparse.Namespace, run_file: RunFile, working_dir: Path) -> "JobRequest":
    from ray_trainer.cluster.jobs import JobRequest

    name = run_file.cluster.name or args.run_file.stem
    return JobRequest(
        name=args.name or name,
        run=f"{run_file.cluster.storage_path.rstrip('/')}/{name}",
        entrypoint=_entrypoint(args, working_dir),
        working_dir=working_dir,
        runtime_env=_runtime_env(args.runtime_env),
        driver_cpus=args.driver_cpus,
    )


def _entrypoint(args: argparse.Namespace, working_dir: Path) -> str:
    """``exec``: the job's exit code and signals are those of the training, not of a shell around it."""
    run_file = args.run_file.resolve().relative_to(working_dir).as_posix()
    return f"exec {shlex.join([args.python, '-m', 'ray_trainer', 'train', run_file, *args.overrides])}"


def _require_packed(working_dir: Path, path: Path, run_file: RunFile) -> None:
    if not working_dir.is_dir():
        raise ConfigError(f"--working-dir = {working_dir}: is no directory")
    packed = {file.name for file in packed_files(working_dir)}
    needed = {"the run file": path.resolve()}
    source = run_file.experiment.rpartition(":")[0]
    if source.endswith(".py") or "/" in source:
        beside = path.resolve().parent / source
        needed["the experiment"] = (beside if beside.is_file() else Path(source)).resolve()
    for what, file in needed.items():
        if not file.is_relative_to(working_dir):
            raise ConfigError(
                f"{what} {file} is not in the working directory {working_dir}, whose files are sent. Give the command "
                "in a directory that holds both, or name it with --working-dir."
            )
        if file.relative_to(working_dir).as_posix() not in packed:
            raise ConfigError(
                f"{what} {file} is not sent, because an ignore file names it or it is in a directory such as runs/. "
                f"Take it back with a line '!{file.relative_to(working_dir).as_posix()}' in {working_dir}/.rayignore."
            )


def _runtime_env(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = dict(read_document(path).values)
    except FileNotFoundError as error:
        raise ConfigError(f"--runtime-env: there is no file {path}") from error
    for name in _OURS:
        if name in values:
            raise ConfigError(f"--runtime-env: {path} sets {name}, which is the working directory; use --working-dir")
    return values


def _tell(submission: "Submission", args: argparse.Namespace) -> None:
    if submission.is_new:
        _show_files(submission.files)
        _say(f"Job {submission.id} is submitted to {args.address}.")
    else:
        _say(f"Job {submission.id} runs already with the same files and command; this is its log.")
    if args.no_wait:
        _say(f"Its log: ray job logs --address {args.address} --follow {submission.id}")
        _say(f"Stop it, with a checkpoint: ray job stop --address {args.address} {submission.id}")


def _show_files(files: list[PackedFile]) -> None:
    total = readable_size(sum(file.size_bytes for file in files))
    parts = ", ".join(f"{name} {readable_size(size)}" for name, size in biggest(files)[:4])
    _say(f"{len(files)} files of {total} in the working directory, most of it {parts}.")


def _write(text: str) -> None:
    """A piece of the job's log; not an error if nobody reads it any more."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for the rest of the program


def _say(text: str) -> None:
    """Ours, apart from the log of the job."""
    print(text, file=sys.stderr)


@contextmanager
def _wishes() -> Iterator[Callable[[], Stop]]:
    """Take the first Ctrl-C or SIGTERM as a wish to stop the job; the second one ends this program."""
    received = Stop.NONE

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if received is not Stop.NONE:
            _say("The job was asked to stop; it saves and ends by itself.")
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        received = Stop.SIGINT if number == signal.SIGINT else Stop.SIGTERM
        _say("Stopping the job, once its checkpoint is written. Once more not to wait for it.")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
