"""Randomness as a function of (seed, where in the run), so that no generator state ever has to be saved.

Each step and each sample seeds the generators anew from its own place. Prefetching, loader processes,
restarts and the number of workers can therefore not change what is drawn.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_GOLDEN = 0x9E37_79B9_7F4A_7C15
_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"

# Keep what is drawn for one purpose independent of what is drawn for another. Changing one changes the result
# of every run.
_STEP, _SAMPLE = 1, 2
_MARK = 0


def derive_seed(*keys: int) -> int:
    """Mix integers into one seed of 63 bits: the same in every process and version.

    A chain of SplitMix64 finalisers (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators", section 5), one round a key; the order of the keys matters.

    Args:
        keys: any integers; they count modulo 2**64.
    """
    state = len(keys)
    for key in keys:
        state = ((state ^ key) + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
        state ^= state >> 31
    return state >> 1


def set_random_seed(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and PyTorch (all devices), for any integer.

    Args:
        seed: used as it is where the library takes it, so a seed of 32 bits gives what seeding by hand gives.
        deterministic: also ask PyTorch for deterministic algorithms, until the `deterministic_mode` around it
            ends or for the rest of the process. False leaves PyTorch's flags as they are.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    torch.manual_seed(seed & _MASK)
    if deterministic:
        _DETERMINISTIC.apply()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the global generators for one step of one rank; dropout masks differ between ranks and steps.

    Costs some 10 microseconds. A GPU is seeded only once PyTorch uses one.
    """
    derived = derive_seed(_STEP, seed, step, rank)
    _seed_cpu_generators(derived)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch left it without annotations
        torch.cuda.manual_seed(derived)


def seed_sample(seed: int, epoch: int, index: int) -> None:
    """Seed the three CPU generators for one sample, so that random augmentation depends on nothing else.

    Call it inside `isolated_rng`.

    Args:
        seed: of the run.
        epoch: counted from 0.
        index: of the sample in its dataset; negative ones are free for what belongs to no sample.
    """
    _seed_cpu_generators(derive_seed(_SAMPLE, seed, epoch, index))


def seed_worker(worker_id: int) -> None:
    """Seed Python and NumPy in a loader's process: ``DataLoader(worker_init_fn=seed_worker)``.

    Args:
        worker_id: not needed, PyTorch's seed already differs between workers.
    """
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)


def create_seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator of its own, for any integer seed."""
    return torch.Generator().manual_seed(seed & _MASK)


def mark_generators() -> None:
    """Put the three CPU generators into a state of which `generators_moved` can tell whether it was left."""
    _seed_cpu_generators(_MARK)


def generators_moved() -> bool:
    """Whether anything was drawn or seeded since `mark_generators`; draws from the generators itself."""
    return _next_numbers() != _numbers_after_mark()


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Put Python's, NumPy's and PyTorch's CPU generators back afterwards: draws inside are not seen outside.

    Costs about 100 microseconds; meant for once a batch, not once a sample.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


@contextmanager
def deterministic_mode(enabled: bool = True) -> Iterator[None]:
    """Ask PyTorch for deterministic algorithms inside, and put flags and environment back as they were.

    Must be entered before CUDA is first used, because cuBLAS reads its workspace setting only then.

    Args:
        enabled: False changes nothing on entry, and still undoes what `set_random_seed` switches on inside.
    """
    before = _DeterminismFlags.current()
    try:
        if enabled:
            _DETERMINISTIC.apply()
        yield
    finally:
        if _DeterminismFlags.current() != before:  # setting them imports a good part of PyTorch's compiler
            before.apply()


@dataclass(frozen=True)
class _DeterminismFlags:
    """Everything of the process that decides whether PyTorch computes deterministically."""

    algorithms: bool
    warn_only: bool
    cudnn_deterministic: bool
    cudnn_benchmark: bool
    cublas_workspace: str | None

    @classmethod
    def current(cls) -> "_DeterminismFlags":
        return cls(
            algorithms=torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            cudnn_deterministic=torch.backends.cudnn.deterministic,
            cudnn_benchmark=torch.backends.cudnn.benchmark,
            cublas_workspace=os.environ.get(_CUBLAS_WORKSPACE),
        )

    def apply(self) -> None:
        torch.use_deterministic_algorithms(self.algorithms, warn_only=self.warn_only)
        torch.backends.cudnn.deterministic = self.cudnn_deterministic
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        if self.cublas_workspace is None:
            os.environ.pop(_CUBLAS_WORKSPACE, None)
        else:
            os.environ[_CUBLAS_WORKSPACE] = self.cublas_workspace


_DETERMINISTIC = _DeterminismFlags(
    algorithms=True,
    warn_only=False,
    cudnn_deterministic=True,
    cudnn_benchmark=False,
    cublas_workspace=":4096:8",
)


def _seed_cpu_generators(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)


def _next_numbers() -> tuple[float, float, float]:
    return random.random(), np.random.random_sample(), float(torch.rand((), dtype=torch.float64))


@cache
def _numbers_after_mark() -> tuple[float, float, float]:
    with isolated_rng():
        mark_generators()
        return _next_numbers()
