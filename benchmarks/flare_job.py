"""What NVIDIA FLARE runs in `round_overhead`: FedAvg over clients that give back what they get.

Imports nothing of EcoGen: FLARE's simulator loads this file in the server's process and in each client's, within an
environment of its own.
"""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.executor import Executor
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.workflows.fedavg import FedAvg

NUM_VALUES = 2**18  # float32: 1 MiB


class TimedFedAvg(FedAvg):
    """FedAvg that notes when each round's model is on disk, as FLARE saves it: without fsync.

    Args:
        poll_s: where given, how often the server looks whether a task is finished: a private attribute, 0.2 otherwise.
    """

    def __init__(self, times: str, poll_s: float | None = None, **settings: Any) -> None:
        super().__init__(persistor_id="", **settings)
        self.times = Path(times)
        self.poll_s = poll_s
        self.ends_s: list[float] = []

    def load_model(self) -> FLModel:
        if self.poll_s is not None:
            self.communicator._task_check_period = self.poll_s
        values = np.random.default_rng(0).standard_normal(NUM_VALUES, dtype=np.float32)
        return FLModel(params={"values": values}, params_type=ParamsType.FULL)

    def save_model(self, model: FLModel) -> None:
        np.save(self.times.with_suffix(".npy"), model.params["values"])
        self.ends_s.append(time.perf_counter())
        if len(self.ends_s) == self.num_rounds:
            self.times.write_text(json.dumps(self.ends_s))


class Echo(Executor):
    """A client without work.

    Args:
        poll_s: where given, the longest that the simulator's worker sleeps between two questions for a task. Without
            it that is 0.5 s once the server has nothing yet: a constant in FLARE's code.
    """

    def __init__(self, poll_s: float | None = None) -> None:
        super().__init__()
        if poll_s is not None:
            longest_s = poll_s
            impatient = types.SimpleNamespace(**vars(time))
            impatient.sleep = lambda seconds: time.sleep(min(seconds, longest_s))
            sys.modules["__main__"].time = impatient  # type: ignore[attr-defined]

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        return shareable
