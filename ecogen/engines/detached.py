"""The process that owns a run which no terminal owns: `python -m ecogen.engines.detached RECIPE FOLDER`.

It is left in the background, or is one of a study's.

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
    from ecogen.engines.forking import fork_server

    path, folder = Path(arguments[0]), Path(arguments[1])
    recipe = recipes.from_table(json.loads(path.read_text()), str(path))
    if recipe.engine == "local":
        fork_server()  # before the imports that take long, since it does the same ones
    from ecogen.engines import session
    from ecogen.engines.run_folder import resume_command
    from ecogen.errors import EcoGenError

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(session.run(recipe, folder, resume="--resume" in arguments, screen=Console(stderr=True)))
    except EcoGenError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except asyncio.CancelledError:
        print(f"interrupted; go on with: {resume_command(folder)}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
