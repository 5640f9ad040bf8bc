"""EcoGen tunes and serves generative models across a cloud, edge sites and end devices.

```python
recipe = ecogen.load("digits")
async with ecogen.launch(recipe) as federation:
    async for record in federation.tune():
        print(record)
    await federation.save("runs/digits")
```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ecogen.config import Recipe, load
from ecogen.errors import EcoGenError

if TYPE_CHECKING:
    from ecogen.engines.federation import Federation
    from ecogen.engines.launch import launch, serve
    from ecogen.models.adapters import load_tuned

__version__ = "0.1.0"

__all__ = ["EcoGenError", "Federation", "Recipe", "launch", "load", "load_tuned", "serve"]

_LAZY = {  # what needs torch is imported when it is used
    "Federation": "ecogen.engines.federation",
    "launch": "ecogen.engines.launch",
    "load_tuned": "ecogen.models.adapters",
    "serve": "ecogen.engines.launch",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ecogen' has no attribute {name!r}")
