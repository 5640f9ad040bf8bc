"""What Flower runs in `flower`: FedAvg over clients that tune with EcoGen's own functions, and the rest is Flower's.

Flower's processes load this file in an environment of their own, with the checkout on PYTHONPATH. What a process keeps
between tasks (the model, the examples) it keeps; where Flower starts a process a task, each loads them anew.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from functools import cache
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects
from torch import Tensor

from ecogen import config as recipes
from ecogen.config.nodes import cluster_counts
from ecogen.models.adapters import classification_config, load_whole
from ecogen.models.checkpoint import open_foundation, save_tensors
from ecogen.models.vit import whole_segment
from ecogen.placement import Segment
from ecogen.runtime.stage import MicrobatchKey, OptimizerSettings, Stage
from ecogen.tuning.data import Examples, load_splits, partition_examples
from ecogen.tuning.device import LocalData

EVALUATION_BATCH = 128  # as `tuning.evaluate`

client_app = ClientApp()
server_app = ServerApp()


@cache
def recipe_at(path: str) -> recipes.Recipe:
    """The recipe that EcoGen's federations of the same turn have."""
    return recipes.from_table(json.loads(Path(path).read_text()), path)


@cache
def stage_of(path: str) -> tuple[Stage, Segment]:
    """The whole model, with fresh tunables."""
    recipe = recipe_at(path)
    foundation = open_foundation(Path(recipe.model.source))
    config = classification_config(foundation, 10)
    return Stage(load_whole(foundation, config, recipe.tunables, recipe.seed)), whole_segment(config)


@cache
def data_of(path: str, client_index: int) -> LocalData:
    """What one client owns: what the device of the cluster with that index owns."""
    recipe = recipe_at(path)
    train = load_splits(recipe.data, recipe.model.image_size, recipe.seed).train
    [parts] = partition_examples(train.labels, recipe.data.partition, cluster_counts(recipe.topology), recipe.seed)
    data = LocalData(train[parts[client_index]], recipe.seed, client_index)
    return data.with_views(recipe.tuning, None)


@cache
def test_of(path: str) -> Examples:
    """The test examples."""
    recipe = recipe_at(path)
    return load_splits(recipe.data, recipe.model.image_size, recipe.seed).test


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """The local steps of one client in one round."""
    path = str(context.run_config["recipe"])
    round_index = int(message.content["config"]["server-round"]) - 1
    tuning, data = recipe_at(path).tuning, data_of(path, int(context.node_config["partition-id"]))
    stage, segment = stage_of(path)
    rate = tuning.learning_rate * tuning.learning_rate_decay**round_index
    settings = OptimizerSettings(rate, tuning.weight_decay, tuning.clip_norm, tuning.epsilon)
    stage.begin(message.content["arrays"].to_torch_state_dict(), settings)
    for epoch in range(tuning.local_epochs):
        for number, batch in enumerate(data.batches(tuning, round_index, epoch)):
            key = MicrobatchKey(number, 0, 0)
            stage.loss(key, segment, batch.inputs, batch.labels, len(batch), input_grads=False)
            stage.backward(key, None)
            stage.step(stage.squared_norm(segment))
    arrays = ArrayRecord(OrderedDict(stage.tunables))
    counted = {"num-examples": len(data.examples), "received-bytes": size_of(message), "sent-bytes": size_of(arrays)}
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(counted)}), reply_to=message)


def size_of(whole: InflatableObject) -> int:
    """Bytes of something, with all that is in it, as Flower serialises it for its API."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(whole).values())


class CountedFedAvg(FedAvg):
    """FedAvg that sums the bytes which the clients counted."""

    def __init__(self, num_clients: int) -> None:
        super().__init__(
            fraction_evaluate=0.0,
            min_train_nodes=num_clients,
            min_available_nodes=num_clients,
            train_metrics_aggr_fn=self._sum,
        )
        self.message_bytes = 0

    def _sum(self, records: list[RecordDict], _: str) -> MetricRecord:
        metrics = [record["metrics"] for record in records]
        self.message_bytes += sum(int(m["received-bytes"]) + int(m["sent-bytes"]) for m in metrics)
        return MetricRecord({"clients": len(metrics)})


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds; writes a line of JSON when the average of a round has been evaluated, and the tunables at the end."""
    path, out = str(context.run_config["recipe"]), Path(str(context.run_config["out"]))
    recipe, (stage, segment), test = recipe_at(path), stage_of(path), test_of(path)
    strategy = CountedFedAvg(sum(cluster_counts(recipe.topology)))

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round == 0:
            return None
        tunables = arrays.to_torch_state_dict()
        accuracy = accuracy_of(stage, segment, tunables, test)
        if server_round == recipe.tuning.rounds:
            save_tensors(out / "tunables.safetensors", tunables)
        line = {"time_s": time.time(), "accuracy": accuracy, "message_bytes": strategy.message_bytes}
        with open(out / "rounds.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        return MetricRecord({"accuracy": accuracy})

    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(OrderedDict(stage.tunables)),
        num_rounds=recipe.tuning.rounds,
        train_config=ConfigRecord(),
        evaluate_fn=evaluate,
    )


def accuracy_of(stage: Stage, segment: Segment, tunables: dict[str, Tensor], test: Examples) -> float:
    """As `tuning.evaluate` measures it."""
    stage.begin(tunables)
    correct = 0
    for start in range(0, len(test), EVALUATION_BATCH):
        batch = slice(start, start + EVALUATION_BATCH)
        correct += int((stage.infer(segment, test.images[batch]).argmax(-1) == test.labels[batch]).sum())
    return correct / len(test)
