"""`ecogen serve` as a person starts it: processes of their own, OpenAI's client, a device that is killed, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import AuthenticationError, NotFoundError, OpenAI

from tests.command import Ran, ended, relatives, started
from tests.greedy import Agree
from tests.models.test_mixed_lora import save_adapter
from tests.serving.commanded import PROMPT, must_say, save_served, wanted

EcoGen = Callable[..., Ran]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("models") / "tiny")


@contextmanager
def serving(
    *arguments: object, key: str = "none", **settings: Any
) -> Iterator[tuple[subprocess.Popen[str], OpenAI, str]]:
    """The process, a client, and the line that it printed."""
    with started("serve", *arguments, "--port", 0, **settings) as process:
        assert process.stdout
        line = process.stdout.readline()
        found = re.match(r"ready: (http://127\.0\.0\.1:\d+/v1) serves ", line)
        assert found, line + (process.stderr.read() if process.stderr else "")
        with OpenAI(base_url=found[1], api_key=key, max_retries=0, timeout=60) as client:
            yield process, client, line


def test_a_device_is_killed_while_it_answers(model: Path, agree: Agree) -> None:
    """The text is as if nothing had happened, and Ctrl-C leaves nothing behind."""
    with serving(model, "--devices", 3) as (process, client, line):
        assert line.rstrip().endswith("serves tiny")
        whole = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=400)
        assert whole.usage
        assert whole.usage.model_dump()["ecogen"]["where"] == [f"edge-0.cluster-0.device-{i}" for i in range(3)]
        assert whole.usage.model_dump()["ecogen"]["energy_j"] > 0
        stream = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=400, stream=True)
        pieces = [next(stream).choices[0].text for _ in range(20)]
        device_processes(process.pid)[-1].kill()
        pieces += [chunk.choices[0].text for chunk in stream]
        answer = wanted(model, 400)
        must_say(whole.choices[0].text, answer, agree)
        must_say("".join(pieces), answer, agree)
        short = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=20)
        must_say(short.choices[0].text, answer[:20], agree)
        family = relatives(process.pid)
        process.send_signal(signal.SIGINT)
        assert ended(process) == 0
        _, alive = psutil.wait_procs(family, 10)
        assert not alive


def test_a_group_of_processes_that_is_told_to_end(model: Path) -> None:
    """As services are: an answer that runs ends first, and nobody takes a node's end for its death."""
    with serving(model, "--devices", 2, "--engine", "local", start_new_session=True) as (process, client, _):
        answer = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=400, stream=True)
        next(answer)
        family = relatives(process.pid)
        os.killpg(process.pid, signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in answer][-1]
        _, said = process.communicate(timeout=45)
        assert process.returncode == 0
        assert "again" not in said
        assert "lost" not in said
        _, alive = psutil.wait_procs(family, 10)
        assert not alive


def device_processes(pid: int) -> list[psutil.Process]:
    """Those that compute: they came last."""
    nodes = [child for child in relatives(pid) if "forkserver" in " ".join(child.cmdline())]
    return sorted(nodes, key=lambda child: child.pid)


def test_keys_adapters_and_books(model: Path, tmp_path: Path, ecogen: EcoGen) -> None:
    adapter = save_adapter(model, tmp_path / "adapter", 1)
    keys = tmp_path / "keys.toml"
    keys.write_text('anna = "a-long-secret-key"\n')
    keys.chmod(0o600)
    served = tmp_path / "served"
    arguments = (model, "--engine", "inproc", "--devices", 2, "--adapter", f"poems={adapter}", "--keys", keys)
    arguments += ("--out", served)
    with serving(*arguments, key="a-long-secret-key") as (process, client, line):
        assert line.rstrip().endswith("serves tiny, poems")
        assert [served.id for served in client.models.list()] == ["tiny", "poems"]
        answers = {
            name: client.completions.create(model=name, prompt=PROMPT, temperature=0, max_tokens=24).choices[0].text
            for name in ("tiny", "poems")
        }
        assert answers["tiny"] != answers["poems"]
        with pytest.raises(NotFoundError, match="The model 'prose' does not exist; did you mean 'poems'"):
            client.completions.create(model="prose", prompt=PROMPT)
        with pytest.raises(AuthenticationError):
            client.with_options(api_key="another").models.list()
        assert "belongs to a run that is going on" in ecogen("serve", *arguments).err
        process.send_signal(signal.SIGTERM)
        assert ended(process) == 0
    books_hold(served, ecogen)


def books_hold(served: Path, ecogen: EcoGen) -> None:
    """Two answers; the one that the server began with nobody had asked for."""
    books = ecogen("report", served, "--json").figures
    assert (books["num_requests"], books["completion_tokens"]) == (2, 48)
    assert list(books["by_tier"]) == ["cloud", "edge", "end"]
    assert sum(cost["energy_j"][1] for cost in books["by_node"].values()) == pytest.approx(
        books["total"]["energy_j"][1]
    )
    for verb in ("report", "status"):
        assert "served 2 requests" in ecogen(verb, served).out


# What may be wrong; nothing here starts a node.


def test_what_cannot_be_served(model: Path, tmp_path: Path, ecogen: EcoGen) -> None:
    shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    adapter = save_adapter(model, tmp_path / "dora", 1, use_dora=True)
    for arguments, said in {
        (tmp_path,): "holds no model: give a folder that save_pretrained wrote, or a finished run",
        (tmp_path / "bare",): "holds no tokenizer that can be read",
        (model, "--adapter", "poems"): "'poems' is not NAME=DIR",
        (model, "--adapter", "a=ad1", "--adapter", "a=ad2"): "the name 'a' is given twice",
        (model, "--adapter", f"{model.name}=ad1"): f"the name '{model.name}' is given twice",
        (model, "--adapter", f"poems={tmp_path}"): "is no adapter: adapter_config.json cannot be read",
        (model, "--adapter", f"poems={adapter}"): "use_dora is true, which cannot share a batch with others; merge it",
        (model, "--keys", tmp_path / "none"): "none",
        (model, "--set", "topology.end.memory_gib=0.0001"): "add a device, or set serving.slots",
        (model, "--recipe", "digits"): '--recipe: digits tunes a model; give one with task = "serve"',
        (model, "--set", "serving.slotz=3"): "did you mean 'slots'",
    }.items():
        ran = ecogen("serve", *arguments, "--engine", "inproc")
        assert ran.code == 2, arguments
        assert said in ran.err, (arguments, ran.err)


def test_others_may_not_ask_without_a_key(model: Path, ecogen: EcoGen) -> None:
    ran = ecogen("serve", model, "--engine", "inproc", "--host", "0.0.0.0", "--port", 0)
    assert ran.code == 2
    assert "without API keys whoever reaches 0.0.0.0 may ask; give keys" in ran.err


def test_a_recipe_that_serves_tunes_nothing(ecogen: EcoGen, tmp_path: Path) -> None:
    ran = ecogen("run", "serve", "--out", tmp_path / "run")
    assert ran.code == 2
    assert "use it as `ecogen serve MODEL --recipe RECIPE`" in ran.err
    assert not (tmp_path / "run").exists()
