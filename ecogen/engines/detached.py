"""The process that owns a run which was left in the background: `python -m ecogen.engines.detached RECIPE FOLDER`.

Each node's process imports the main module again, so this one imports what it needs only when it runs.
"""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    """Run what a recipe file says; its log is standard error."""
    import asyncio
    import json
    import logging
    from pathlib import Path

    from rich.console import Console

    from ecogen import config as recipes
    from ecogen.engines import session
    from ecogen.errors import EcoGenError

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    path, folder = Path(arguments[0]), Path(arguments[1])
    recipe = recipes.from_table(json.loads(path.read_text()), str(path))
    try:
        asyncio.run(session.run(recipe, folder, resume="--resume" in arguments, screen=Console(stderr=True)))
    except EcoGenError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
