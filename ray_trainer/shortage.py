"""Memory that does not suffice: recognising it, and saying what took it and what to change."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ray_trainer.errors import MemoryShortageError

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")


def is_shortage(error: BaseException) -> bool:
    """Whether an error, or the one behind it, says that memory was asked for and not there."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(seen, RuntimeError | OSError) and any(words in str(seen).lower() for words in _WORDS):
            return True
        seen = seen.__cause__
    return False


def explained(
    error: BaseException, where: str, batch_size: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> MemoryShortageError:
    """The error to raise in place of one that `is_shortage`.

    Args:
        error: what was raised.
        where: in words, such as ``step 12``.
        batch_size: samples that are processed at once; 0 where it was not in processing them.
        model: its size is told.
        optimizer: likewise.
    """
    taken = "; ".join(_sizes(model, optimizer))
    samples = f", with {batch_size} sample{'s' * (batch_size != 1)} at once" if batch_size else ""
    now = f" ({batch_size})" if batch_size else ""
    return MemoryShortageError(
        f"Out of memory in {where}{samples}: {_first_line(error)}. {taken}. What to do:\n"
        f"  - lower batch_size{now}, the samples of a worker that are processed at once; with "
        "global_batch_size set, steps stay what they are\n"
        "  - set on_out_of_memory to 'halve', which does that by itself when it is needed\n"
        "  - set precision to 'bf16-mixed', or parallelism to 'fsdp' to share model and optimizer among workers\n"
        "  - look for what grows from step to step, such as losses that are kept with their graphs"
    )


def kernel_kills() -> int:
    """How many processes of this machine its kernel has ended for want of memory; 0 where it does not tell."""
    try:
        counts = Path("/proc/vmstat").read_text().splitlines()
        return next(int(line.split()[1]) for line in counts if line.startswith("oom_kill "))
    except (OSError, ValueError, StopIteration):
        return 0


def _sizes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[str]:
    parameters = list(model.parameters())
    yield (
        f"Parameters take {_size(_bytes(parameters))}, their gradients "
        f"{_size(_bytes(parameter for parameter in parameters if parameter.requires_grad))}"
    )
    if optimizer is not None:
        states = (value for state in optimizer.state.values() for value in state.values())
        yield f"the optimizer's state {_size(_bytes(value for value in states if isinstance(value, Tensor)))}"
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        yield f"of the GPU's {_size(total)}, {_size(free)} are free"
    else:
        yield from _of_the_host()


def _of_the_host() -> Iterator[str]:
    """What Linux tells; nothing elsewhere."""
    try:
        mine = _told_by("/proc/self/status", "VmRSS")
        total, free = (_told_by("/proc/meminfo", name) for name in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, StopIteration):
        return
    yield f"this process has {_size(mine)}, and of the machine's {_size(total)}, {_size(free)} are free"


def _told_by(path: str, name: str) -> int:
    """In bytes."""
    lines = Path(path).read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) << 10


def _bytes(tensors: Iterator[Tensor] | list[nn.Parameter]) -> int:
    return sum(_local(tensor).numel() * tensor.element_size() for tensor in tensors)


def _local(tensor: Tensor) -> Tensor:
    """Of a sharded tensor this rank's part."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _size(number: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number = number / 1000  # type: ignore[assignment]  # printed with three digits
    return f"{number:.3g} GB"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
