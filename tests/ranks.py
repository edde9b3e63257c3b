"""Functions run by several processes that talk over gloo."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
from experiments import FORKSERVER_IMPORTS
from ports import free_ports

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([*FORKSERVER_IMPORTS, "torch.distributed.fsdp", "torch.distributed.checkpoint"])


def in_rank(rank: int, port: int, world_size: int, answer: Path, work: Any, arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    torch.save(work(*arguments), answer)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def exit_codes(world_size: int, work: Any, run_dir: Path, *arguments: Any) -> list[int | None]:
    """How each of some processes ended that called a function; what it returned is in a file beside the run."""
    (port,) = free_ports(1)
    processes = [
        PROCESSES.Process(target=in_rank, args=(rank, port, world_size, answer, work, (run_dir, *arguments)))
        for rank, answer in enumerate(_answers(world_size, run_dir))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]  # None for a rank that hangs
    for process in processes:
        process.kill()
    return codes


def on_ranks(world_size: int, work: Any, run_dir: Path, *arguments: Any) -> list[Any]:
    """What a function returned on each of some processes."""
    codes = exit_codes(world_size, work, run_dir, *arguments)
    assert codes == [0] * world_size, f"exit codes {codes}"
    return [torch.load(answer, weights_only=False) for answer in _answers(world_size, run_dir)]


def _answers(world_size: int, run_dir: Path) -> list[Path]:
    return [run_dir.with_name(f"{run_dir.name}-{rank}.pt") for rank in range(world_size)]
