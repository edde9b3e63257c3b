"""On PYTHONPATH: to the package every process has another Ray, whose internal modules it does not find.

Ray itself goes on finding them, which is what moving them looks like from outside.
"""

import builtins
from typing import Any

_INTERNAL = ("ray._", "ray.train.v2._internal")
_import = builtins.__import__


def find(name: str, globals: Any = None, *others: Any, **named: Any) -> Any:
    importer = str((globals or {}).get("__name__"))
    if importer.startswith("ray_trainer.") and name.startswith(_INTERNAL):
        raise ImportError(f"no module {name} in another Ray")
    return _import(name, globals, *others, **named)


builtins.__import__ = find
