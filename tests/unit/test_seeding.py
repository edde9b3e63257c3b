import os
import random

import numpy as np
import pytest
import torch

from ray_trainer.seeding import (
    create_seeded_generator,
    derive_seed,
    deterministic_mode,
    generators_moved,
    isolated_rng,
    mark_generators,
    seed_sample,
    seed_step,
    seed_worker,
    set_random_seed,
)


def draw() -> tuple[float, float, float, float]:
    return random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))


def draw_and_fail() -> None:
    set_random_seed(2)
    draw()
    raise KeyError


def flags() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


def test_derived_seeds_are_pinned_because_runs_depend_on_them():
    assert derive_seed(0) == 5225608189600411232
    assert derive_seed(42, 7) == 3445748302417445640
    assert derive_seed(-1, 2**70) == 4524403860604507531


def test_derived_seeds_do_not_collide_for_neighbouring_keys():
    seeds = {derive_seed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derived_seed_depends_on_the_order_and_number_of_keys():
    assert len({derive_seed(1, 2), derive_seed(2, 1), derive_seed(1, 2, 0), derive_seed(0, 1, 2)}) == 4


def test_the_bits_of_derived_seeds_are_balanced():
    seeds = np.array([derive_seed(42, step) for step in range(4000)], dtype=np.uint64)
    share = ((seeds[:, None] >> np.arange(63, dtype=np.uint64)) & np.uint64(1)).mean(axis=0)
    assert np.abs(share - 0.5).max() < 5 * 0.5 / np.sqrt(4000)  # five standard errors


def test_a_small_seed_gives_what_seeding_by_hand_gives():
    set_random_seed(42)
    ours = draw()
    random.seed(42)
    np.random.seed(42)
    torch.manual_seed(42)
    assert ours == draw()


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, -(2**63), 2**80])
def test_any_integer_is_a_seed(seed):
    set_random_seed(seed)
    first = draw()
    set_random_seed(seed)
    assert draw() == first
    assert create_seeded_generator(seed).initial_seed() == seed % 2**64


def test_steps_and_ranks_draw_different_numbers_and_the_same_ones_again():
    drawn = {}
    for place in [(0, 0), (0, 1), (1, 0)]:
        seed_step(42, *place)
        drawn[place] = draw()
    seed_step(42, 0, 1)
    assert draw() == drawn[0, 1]
    assert len({value for values in drawn.values() for value in values}) == 12


def test_a_sample_draws_the_same_whatever_was_drawn_before():
    seed_sample(42, 3, 17)
    first = draw()
    torch.rand(100)
    seed_sample(42, 3, 17)
    assert draw() == first
    seed_sample(42, 4, 17)
    assert draw() != first
    seed_step(42, 3, 17)
    assert draw() != first


def test_isolated_rng_hides_what_is_drawn_inside_even_after_an_error():
    set_random_seed(1)
    np.random.randn()  # leaves a cached second normal number behind
    before = random.getstate(), torch.get_rng_state()
    expected = np.random.RandomState(1)
    expected.randn()
    with pytest.raises(KeyError), isolated_rng():
        draw_and_fail()
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.random.randn() == expected.randn()


@pytest.mark.parametrize("draw", [random.random, np.random.randn, lambda: torch.rand(3), lambda: seed_step(1, 2, 3)])
def test_generators_tell_whether_something_was_drawn(draw):
    mark_generators()
    assert not generators_moved()
    mark_generators()
    draw()
    assert generators_moved()


def test_a_loader_worker_is_seeded_from_the_seed_torch_gave_it():
    torch.manual_seed(99)
    seed_worker(0)
    drawn = random.random(), np.random.rand()
    assert drawn == (random.Random(99).random(), np.random.RandomState(99).rand())


def test_deterministic_mode_is_undone_afterwards(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = flags()
    with deterministic_mode():
        assert flags() == (True, False, True, False, ":4096:8")
    assert flags() == before


def test_disabled_deterministic_mode_undoes_what_seeding_switches_on_inside(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with deterministic_mode(False):
        assert flags() == before
        set_random_seed(1, deterministic=True)
        assert flags() != before
    assert flags() == before
