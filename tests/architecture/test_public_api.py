"""What users import: it is there, it is sorted, it needs no Ray, and its errors travel between processes."""

import inspect
import pickle
import subprocess
import sys

import pytest

import ray_trainer
import ray_trainer.cluster
from ray_trainer import errors

ERRORS = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, Exception)]
WITHOUT_RAY = """
import sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoRay())
import ray_trainer
for name in ray_trainer.__all__:
    getattr(ray_trainer, name)
assert not any(name.partition(".")[0] == "ray" for name in sys.modules)
"""


@pytest.mark.parametrize("module", [ray_trainer, ray_trainer.cluster], ids=lambda module: module.__name__)
def test_public_names_are_sorted_and_importable(module):
    assert module.__all__ == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_unknown_name_of_the_cluster_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="fitt"):
        _ = ray_trainer.cluster.fitt


def test_core_is_imported_where_ray_is_not_installed():
    done = subprocess.run([sys.executable, "-c", WITHOUT_RAY], capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_error_survives_pickling(kind):
    error = kind("batch_size (0) must be at least 1")

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is kind
    assert str(copy) == str(error)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_of_the_module_belongs_to_one_tree(kind):
    assert issubclass(kind, errors.RayTrainerError)
