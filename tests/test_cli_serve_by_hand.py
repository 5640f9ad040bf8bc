"""`ecogen serve --join`: cloud, edge and devices in processes that somebody started, a gateway that comes and goes."""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from openai import OpenAI
from openai.types import Completion

from ecogen.engines.by_hand import split_parent
from ecogen.engines.joined import join_serving
from ecogen.engines.served import Served, find_served
from ecogen.errors import CheckpointError
from ecogen.models.mixed_lora import open_adapter
from ecogen.serving.generation import GenerationRequest
from ecogen.serving.sampling import Chosen
from tests.command import Ran, ended, started, wait_until
from tests.engines.test_by_hand import ROOT, address_of, free_port, of_this_machine
from tests.greedy import Agree, Greedy
from tests.models.decoders import save_decoder
from tests.models.test_mixed_lora import save_adapter
from tests.serving.commanded import PROMPT, must_say, save_served, wanted
from tests.serving.federations import GREEDY, answer, whole_answer

EcoGen = Callable[..., Ran]
DEVICES = [f"edge-0.cluster-0.device-{index}" for index in range(2)]
TIERS = {"cloud": "cloud", "edge-0": "edge", **dict.fromkeys(DEVICES, "end"), "operator": "operator"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def certificates(ecogen: EcoGen, tmp_path: Path) -> Path:
    folder = tmp_path / "certs"
    assert ecogen("certs", "init", folder / "authority").code == 0
    for node_id, tier in TIERS.items():
        assert ecogen("certs", "issue", folder / "authority", node_id, tier, "--out", folder / node_id).code == 0
    return folder


class Nodes:
    """Nodes in processes of their own, each with its disk and its port."""

    def __init__(self, certificates: Path, disks: Path, stack: ExitStack) -> None:
        self._certificates, self._disks, self._stack = certificates, disks, stack
        self._addresses = {node_id: f"127.0.0.1:{free_port()}" for node_id in TIERS}
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def at(self, node_id: str) -> str:
        return f"{node_id}@{self._addresses[node_id]}"

    def start(self, node_id: str, *more: object) -> None:
        """Whoever shall join it may be there already."""
        own = ("--certs", self._certificates / node_id, "--folder", self._disks / node_id)
        process = started("node", node_id, *own, "--listen", self._addresses[node_id], *more)
        self.processes[node_id] = self._stack.enter_context(process)

    def kill(self, node_id: str) -> None:
        self.processes[node_id].kill()
        self.processes[node_id].wait(10)

    def move(self, node_id: str) -> None:
        """From now on it has another port."""
        self._addresses[node_id] = f"127.0.0.1:{free_port()}"

    def end(self) -> None:
        """End all in order; none of them has anything to complain of."""
        for process in reversed(self.processes.values()):
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            assert process.wait(30) == 0
            assert process.stderr
            assert "Traceback" not in process.stderr.read()


@pytest.fixture
def nodes(certificates: Path, tmp_path: Path) -> Iterator[Nodes]:
    with ExitStack() as stack:
        yield Nodes(certificates, tmp_path / "disks", stack)


@pytest.mark.slow  # seven processes, each of which imports everything
def test_nodes_started_by_hand_serve(
    model: Path,
    certificates: Path,
    nodes: Nodes,
    ecogen: EcoGen,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    agree: Agree,
) -> None:
    """A device is killed in mid-answer and comes back elsewhere; a gateway goes and another comes."""
    for device in DEVICES:
        nodes.start(device, "--join", nodes.at("edge-0"))
    nodes.start("cloud", "--recipe", "serve", "--set", f"model.source={model}", "--set", "serving.patience_s=90")
    address_of(nodes.processes["cloud"])
    asyncio.run(a_gateway_waits(certificates, nodes))
    assert "not here: edge-0" in caplog.text
    cloud = ("--join", nodes.at("cloud"), "--certs", certificates / "operator")
    with started("serve", *cloud, "--port", 0) as gateway:
        assert gateway.stdout
        assert gateway.stderr
        line = gateway.stdout.readline()
        found = re.fullmatch(r"ready: (http://127\.0\.0\.1:\d+/v1) serves tiny\n", line)
        assert found, line + gateway.stderr.read()
        with OpenAI(base_url=found[1], api_key="none", max_retries=0, timeout=60) as client:
            a_device_is_killed_while_it_answers(client, nodes, wanted(model, 400), agree)
        gateway.send_signal(signal.SIGINT)
        assert ended(gateway) == 0
        assert "Traceback" not in gateway.stderr.read()
    asyncio.run(another_gateway_answers(certificates, nodes, model, save_adapter(model, tmp_path / "adapter", 1)))
    watched = ecogen("watch", nodes.at("cloud"), "--certs", certificates / "operator", "--out", tmp_path / "run")
    assert watched.code == 2
    assert "cloud serves and has no end to wait for" in watched.err
    status = ("status", nodes.at("cloud"), "--certs", certificates / "operator")
    ecogen(*status)
    time.sleep(5)  # nothing is recorded meanwhile, but all are heard
    shown = ecogen(*status).out
    assert "serving 1/1 edges are ready" in shown
    for node_id in ("cloud", "edge-0", *DEVICES):
        assert re.search(rf"{node_id} +\w+ +ready +\S+ +(now|[\d.]+ ms ago|[0-3]\.\d+ s ago) ", shown), shown
    nodes.end()


async def a_gateway_waits(certificates: Path, nodes: Nodes) -> None:
    """For an edge that is not there yet."""
    async with join_serving(*split_parent("--join", nodes.at("cloud")), certificates / "operator") as (gateway, _):
        waiting = asyncio.create_task(answer(gateway, [5, 6, 7], 2))
        await asyncio.sleep(0.5)
        nodes.start("edge-0", "--join", nodes.at("cloud"))
        assert len(await waiting) == 2


def a_device_is_killed_while_it_answers(client: OpenAI, nodes: Nodes, expected: Greedy, agree: Agree) -> None:
    """And comes back where another address is its own."""

    def ask(max_tokens: int) -> Completion:
        return client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=max_tokens)

    whole = ask(400)
    assert where(whole) == DEVICES
    stream = client.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=400, stream=True)
    pieces = [next(stream).choices[0].text for _ in range(20)]
    nodes.kill(DEVICES[1])
    pieces += [chunk.choices[0].text for chunk in stream]
    must_say(whole.choices[0].text, expected, agree)
    must_say("".join(pieces), expected, agree)
    assert where(ask(1)) == DEVICES[:1]
    nodes.move(DEVICES[1])
    nodes.start(DEVICES[1], "--join", nodes.at("edge-0"))
    wait_until(lambda: where(ask(1)) == DEVICES)
    must_say(ask(20).choices[0].text, expected[:20], agree)


def where(completion: Completion) -> list[str]:
    assert completion.usage
    found: list[str] = completion.usage.model_dump()["ecogen"]["where"]
    return found


async def another_gateway_answers(certificates: Path, nodes: Nodes, model: Path, adapter: Path) -> None:
    """It finds the nodes as the first has left them, brings an adapter, and drains a device."""
    parent = (*split_parent("--join", nodes.at("cloud")), certificates / "operator")
    save_decoder("llama", other := adapter.parent / "other")
    with pytest.raises(CheckpointError, match="is not the model that cloud serves"):
        async with join_serving(*parent, Served(other, "other")):
            pass
    shutil.copytree(model, same := adapter.parent / "same")
    (same / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="makes other tokens of text and pictures than cloud does"):
        async with join_serving(*parent, Served(same, "same")):
            pass
    async with join_serving(*parent, find_served(model)) as (gateway, _):
        await gateway.drain(DEVICES[0])
        for _ in range(50):
            _, finish = await whole_answer(gateway, [5, 6, 7], 2)
            if finish.node_ids == (DEVICES[1],):
                break
            await asyncio.sleep(0.2)
        assert finish.node_ids == (DEVICES[1],)
        await gateway.drain(DEVICES[0], is_out=False)
        alone = await answer(gateway, [5, 6, 7], 24)
        await gateway.versions.put_adapter("poems", open_adapter(adapter))
        poems = GenerationRequest("poems", (5, 6, 7), GREEDY, 24)
        assert alone != [one.token async for one in gateway.generate(poems) if isinstance(one, Chosen)]


@pytest.mark.slow
def test_the_commands_of_the_documentation(model: Path, tmp_path: Path) -> None:
    """Those of docs/serving.md, with this machine's address, free ports and a tiny model."""
    section = (ROOT / "docs" / "serving.md").read_text().partition("## On several machines")[2]
    block = section.split("```")[1].replace("\\\n", "")
    commands = [shlex.split(line) for line in block.splitlines() if line.startswith("ecogen")]
    adapter = save_adapter(model, tmp_path / "adapter", 1)
    ports = {port: free_port() for port in ("7000", "7001", "7002", "7003")}
    with ExitStack() as stack:
        for _, *arguments in commands:
            here = [of_this_machine(argument, ports) for argument in arguments]
            here = [
                part.replace("=runs/text/adapter", f"={adapter}").replace("=runs/text", f"={model}") for part in here
            ]
            process = stack.enter_context(started(*here, *(("--port", 0) if here[0] == "serve" else ()), cwd=tmp_path))
            if here[0] == "node":
                address_of(process)
            elif here[0] == "serve":
                assert process.stdout
                assert "serves tiny, text" in process.stdout.readline()
            else:
                said, errors = process.communicate(timeout=60)
                assert process.returncode == 0, errors
    assert "served 0 requests" in said  # nobody has asked anything yet


# What may be wrong; nothing here starts a node.


def test_what_cannot_be_joined(model: Path, certificates: Path, tmp_path: Path, ecogen: EcoGen) -> None:
    certs = ("--certs", certificates / "operator")
    for arguments, said in {
        (): "give RUN_OR_MODEL, or --join a cloud that serves",
        ("--join", "cloud@h:1"): "--join and --certs go together",
        (model, *certs): "--join and --certs go together",
        ("--join", "cloud", *certs): "--join: 'cloud' is not ID@HOST:PORT",
        ("--join", "cloud@127.0.0.1:9", *certs): "node 'cloud' is lost: no connection to 127.0.0.1:9",
        ("--join", "cloud@h:1", *certs, "--devices", 3): "leave out topology.devices_per_cluster=3",
        ("--join", "cloud@h:1", "--certs", certificates / "cloud"): "is of tier 'cloud', not 'operator'",
    }.items():
        ran = ecogen("serve", *arguments)
        assert ran.code == 2, arguments
        assert said in ran.err, (arguments, ran.err)


def test_a_cloud_that_cannot_serve(model: Path, certificates: Path, tmp_path: Path, ecogen: EcoGen) -> None:
    cloud = ("node", "cloud", "--certs", certificates / "cloud", "--folder", tmp_path / "disk", "--recipe", "serve")
    for settings, said in {
        (): "model.source: 'pretrain' cannot be served; name a run or a model's folder",
        (f"model.source={tmp_path}",): "holds no model: give a folder that save_pretrained wrote, or a finished run",
        (f"model.source={model}", "topology.end.memory_gib=0.0001"): "add a device, or set serving.slots",
    }.items():
        ran = ecogen(*cloud, *(part for setting in settings for part in ("--set", setting)))
        assert ran.code == 2, settings
        assert said in ran.err, (settings, ran.err)
    assert not (tmp_path / "disk").exists()


def test_asking_a_cloud_needs_a_certificate(ecogen: EcoGen) -> None:
    ran = ecogen("status", "cloud@127.0.0.1:1")
    assert ran.code == 2
    assert "is no run folder; to ask a cloud, give an operator's certificate with --certs" in ran.err
