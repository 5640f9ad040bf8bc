"""Tune a foundation model with a federation in this process, and use the result as an ordinary model.

python examples/tune.py [KEY=VALUE ...]
"""

import asyncio
import sys
from pathlib import Path

import torch

import ecogen


async def main(overrides: list[str], folder: Path) -> None:
    recipe = ecogen.load("digits", overrides)
    async with ecogen.launch(recipe) as federation:  # engine: inproc | local, as the recipe says
        async for record in federation.tune():  # one RoundRecord a round, as the nodes publish them
            print(f"round {record.round_index + 1} {record.node_id}: accuracy {record.accuracy:.3f}")
        summary = await federation.save(folder)  # tunables, PEFT adapter, records, ledger, report.html
    print(f"accuracy {summary['accuracy']['last']:.3f}, {summary['energy_j']['mid']:.0f} J")

    model = ecogen.load_tuned(folder)  # a transformers model with prompts, LoRA and head on
    print("logits of a blank picture:", model(torch.full((1, 1, 28, 28), -1.0)).logits.shape)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:], Path("runs/example")))
