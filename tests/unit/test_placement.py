import pytest
import torch
from torch import nn

from ray_trainer import TrainingConfig
from ray_trainer.errors import ConfigError
from ray_trainer.fsdp import blocks_of, rebind
from ray_trainer.placement import PlacedOptimizer, Placement, place_model


class Named(nn.Module):
    """Says itself which of its modules are blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def fsdp_modules(self) -> list[nn.Module]:
        return [self.second]


class HuggingFaceStyle(nn.Module):
    _no_split_modules = ("TransformerEncoderLayer",)

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.TransformerEncoderLayer(4, 1, 8)


def names(model):
    by_id = {id(module): name for name, module in model.named_modules()}
    return sorted(by_id[id(module)] for module in blocks_of(model))


def test_repeated_modules_of_lists_are_blocks():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)) for _ in range(2))
    model.head = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))

    assert names(model) == ["layers.0", "layers.1"]


def test_lists_of_lists_are_looked_into():
    model = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(2)) for _ in range(2))

    assert names(model) == ["0.0", "0.1", "1.0", "1.1"]


def test_model_names_its_own_blocks():
    assert names(Named()) == ["second"]


def test_blocks_of_models_of_hugging_face_are_known_by_class():
    assert names(HuggingFaceStyle()) == ["only"]


def test_block_that_shares_a_parameter_stays_with_the_rest():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    model.head = nn.Linear(2, 2)
    model.head.weight = model.layers[1].weight

    assert names(model) == ["layers.0", "layers.2"]


def test_module_that_is_no_part_of_the_model_is_refused():
    model = Named()
    model.fsdp_modules = lambda: [nn.Linear(1, 1)]

    with pytest.raises(ConfigError, match=r"Named\.fsdp_modules\(\) returns something that is no module"):
        blocks_of(model)


def test_one_process_keeps_the_whole_model():
    model = nn.Linear(2, 2)
    placed = place_model(model, None, torch.device("cpu"), TrainingConfig(parallelism="fsdp"))

    assert placed is model
    assert Placement.of(model, torch.optim.SGD(model.parameters())).share is None


def test_optimizer_goes_on_with_the_parameters_that_took_the_places_of_its_own():
    before, after = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.Adagrad([{"params": [before.weight]}, {"params": [before.bias], "lr": 0.5}])

    rebind(optimizer, list(before.parameters()), list(after.parameters()))

    assert [group["params"][0] is new for group, new in zip(optimizer.param_groups, after.parameters(), strict=True)]
    assert set(optimizer.state) == set(after.parameters())


def test_restored_optimizer_computes_as_it_was_built_to():
    weight = nn.Parameter(torch.ones(2))
    saved = torch.optim.SGD([weight], lr=0.5, momentum=0.9, fused=True).state_dict()
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.1, foreach=False)

    PlacedOptimizer(optimizer).load_state_dict(saved)

    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["fused"], group["foreach"]) == (0.5, 0.9, None, False)


def test_compiled_and_sharded_at_once_is_refused():
    with pytest.raises(ConfigError, match="compile_mode = 'default': does not go together with parallelism = 'fsdp'"):
        TrainingConfig(parallelism="fsdp", compile_mode="default").validate()


def test_other_trainers_names_lead_to_parallelism():
    with pytest.raises(ConfigError, match="did you mean 'parallelism'"):
        TrainingConfig(strategy="fsdp")
