"""A federation that somebody starts by hand, node by node, with certificates that the command line issued."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from ecogen.config import Recipe
from ecogen.engines.by_hand import node_settings
from ecogen.models.checkpoint import load_tensors
from tests import runs
from tests.command import Ran, save_recipe, started

RecipeOf = Callable[..., Recipe]
EcoGen = Callable[..., Ran]

ROOT = Path(__file__).parents[2]
DEVICES = [f"edge-0.cluster-0.device-{index}" for index in range(2)]
TIERS = {"cloud": "cloud", "edge-0": "edge", **dict.fromkeys(DEVICES, "end"), "operator": "operator"}


@pytest.fixture
def certificates(ecogen: EcoGen, tmp_path: Path) -> Path:
    """An authority and a folder for each node, as an operator would make them."""
    folder = tmp_path / "certs"
    assert ecogen("certs", "init", folder / "authority", "--federation", "farm").code == 0
    for node_id, tier in TIERS.items():
        issued = ecogen("certs", "issue", folder / "authority", node_id, tier, "--out", folder / node_id)
        assert f"issued ecogen://farm/{tier}/{node_id}" in issued.out
    return folder


@pytest.fixture
def nodes(certificates: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts nodes, each in a process of its own; all are ended with the test."""
    with ExitStack() as stack:

        def start(node_id: str, *more: object) -> subprocess.Popen[str]:
            arguments = (node_id, "--certs", certificates / node_id, "--folder", tmp_path / "disks" / node_id, *more)
            return stack.enter_context(started("node", *arguments))

        yield start


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said = process.stdout.readline()
    assert " serves at " in said, process.communicate()
    return said.split()[-1]


def test_four_nodes_started_by_hand_tune_to_the_end(
    recipe_of: RecipeOf, certificates: Path, nodes: Callable[..., subprocess.Popen[str]], ecogen: EcoGen, tmp_path: Path
) -> None:
    recipe = recipe_of(topology={"clusters_per_edge": 1})
    revoked = ("--revoked", certificates / "authority" / "revoked.pem")
    cloud = nodes("cloud", "--recipe", save_recipe(recipe, tmp_path / "r.toml"), *revoked)
    cloud_address = address_of(cloud)
    joining = ("--join", f"cloud@{cloud_address}")

    refuse_wrong_certificates(ecogen, certificates, tmp_path, joining)

    edge = nodes("edge-0", *joining, *revoked)
    edge_address = address_of(edge)
    devices = [nodes(node_id, "--join", f"edge-0@{edge_address}") for node_id in DEVICES]
    ran = ecogen(
        "watch", f"cloud@{cloud_address}", "--certs", certificates / "operator", "--out", tmp_path / "run", "--json"
    )
    assert ran.code == 0, ran.err
    assert ran.figures["accuracy"]["last"] is not None
    assert ran.figures["engine"] == "by hand"
    again = ecogen("watch", f"cloud@{cloud_address}", "--certs", certificates / "operator", "--out", tmp_path / "run")
    assert again.code == 2
    assert "holds a run already; choose another folder with --out" in again.err
    together = asyncio.run(runs.run(recipe, tmp_path / "together"))
    assert ran.figures["accuracy"]["per_round"] == [r.accuracy for r in together.rounds("cloud")]
    apart = load_tensors(tmp_path / "run" / "tunables.safetensors")
    assert all(apart[name].equal(tensor) for name, tensor in together.tunables.items())
    answered_from(tmp_path / "run", ecogen, tmp_path)
    for process in (*devices, edge, cloud):
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def answered_from(run: Path, ecogen: EcoGen, tmp_path: Path) -> None:
    """The folder is a run folder like any other."""
    assert (run / "report.html").stat().st_size > 10_000
    assert "finished after" in ecogen("status", run).out
    assert ecogen("report", run).code == 0
    Image.new("L", (28, 28), 255).save(tmp_path / "white.png")
    assert not [name for name in load_tensors(run / "backbone" / "model.safetensors") if "classifier" in name]
    predicted = ecogen("predict", run, tmp_path / "white.png")
    assert "white.png: " in predicted.out
    assert "UNEXPECTED" not in predicted.out + predicted.err


def refuse_wrong_certificates(ecogen: EcoGen, certificates: Path, tmp_path: Path, joining: tuple[str, str]) -> None:
    """A node that is not who it should be ends with code 2 and says what is wrong."""

    def join(node_id: str, folder: Path, *more: object) -> Ran:
        return ecogen("node", node_id, "--certs", folder, "--folder", tmp_path / "wrong", *joining, *more)

    other = join("edge-0", certificates / "cloud")
    assert other.code == 2
    assert "node.pem is of node 'cloud', not 'edge-0'" in other.err

    ecogen("certs", "issue", certificates / "authority", "edge-0", "end", "--out", tmp_path / "tier")
    tier = join("edge-0", tmp_path / "tier")
    assert tier.code == 2
    assert "'edge-0' (end) may not call 'join' of 'cloud'; only edge may" in tier.err

    ecogen("certs", "init", tmp_path / "strangers", "--federation", "farm")
    ecogen("certs", "issue", tmp_path / "strangers", "edge-0", "edge", "--out", tmp_path / "stranger")
    stranger = join("edge-0", tmp_path / "stranger")
    assert stranger.code == 2
    assert "do not trust each other" in stranger.err

    ecogen("certs", "issue", certificates / "authority", "edge-9", "edge", "--out", tmp_path / "edge-9")
    unexpected = join("edge-9", tmp_path / "edge-9")
    assert unexpected.code == 2
    assert "'edge-9' is not expected here; expected: edge-0" in unexpected.err

    assert "revoked 1 of 'edge-9'" in ecogen("certs", "revoke", certificates / "authority", "edge-9").out
    revoked = join("edge-9", tmp_path / "edge-9")
    assert revoked.code == 2
    assert "of node 'edge-9' is revoked" in revoked.err
    shown = [json.loads(line) for line in ecogen("certs", "show", certificates / "authority").out.splitlines()]
    assert [entry["node_id"] for entry in shown] == [*TIERS, "edge-0", "edge-9"]


def test_a_port_in_use(ecogen: EcoGen, certificates: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        ran = ecogen(
            *("node", "edge-0", "--certs", certificates / "edge-0", "--folder", tmp_path / "disk"),
            *("--join", "cloud@127.0.0.1:9", "--listen", listen),
        )
    assert ran.code == 2
    assert f"cannot listen on {listen}: the port is taken" in ran.err
    assert "choose another port" in ran.err


@pytest.mark.parametrize(("said", "limit"), [(None, 32), (16, 16)])
def test_a_cloud_takes_its_largest_message_from_the_recipe_unless_told(
    recipe_of: RecipeOf, certificates: Path, tmp_path: Path, said: int | None, limit: int
) -> None:
    cloud = node_settings(
        *("cloud", certificates / "cloud", tmp_path / "disk", recipe_of(transport={"message_mib": 32})),
        **{"join": None, "listen": "127.0.0.1:0", "device": "cpu", "dtype": "float32", "message_mib": said},
    )
    assert cloud.message_mib == limit


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--message-mib", "4", "--join", "cloud@h:1"], "'--message-mib': Input should be greater than or equal to 8"),
        (["--join", "cloud"], "--join: 'cloud' is not ID@HOST:PORT"),
        (["--join", "cloud@host:x"], "--join: 'cloud@host:x' is not ID@HOST:PORT"),
        (["--listen", "7000", "--join", "cloud@h:1"], "--listen: '7000' is not HOST:PORT"),
        ([], "a node of tier 'edge' needs a parent to join"),
        (["--device", "tpu", "--join", "cloud@h:1"], "device"),
    ],
)
def test_malformed_options(ecogen: EcoGen, certificates: Path, tmp_path: Path, more: list[str], said: str) -> None:
    ran = ecogen("node", "edge-0", "--certs", certificates / "edge-0", "--folder", tmp_path / "disk", *more)
    assert ran.code == 2
    assert said in ran.err


def test_a_cloud_whose_recipe_cannot_be_carried_out(
    ecogen: EcoGen, recipe_of: RecipeOf, certificates: Path, tmp_path: Path
) -> None:
    recipe = save_recipe(recipe_of(topology={"devices_per_cluster": 5}), tmp_path / "r.toml")
    cloud = ("node", "cloud", "--certs", certificates / "cloud", "--folder", tmp_path / "disk")
    assert "5 devices cannot share 3 blocks" in ecogen(*cloud, "--recipe", recipe).err
    assert "needs a recipe" in ecogen(*cloud).err
    assert not (tmp_path / "disk" / "records.jsonl").exists()


def test_who_may_not_watch(ecogen: EcoGen, certificates: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    no_operator = ecogen("watch", "cloud@127.0.0.1:9", "--certs", certificates / "edge-0", *out)
    assert no_operator.code == 2
    assert "is of tier 'edge', not 'operator'" in no_operator.err
    nobody = ecogen("watch", "cloud@127.0.0.1:9", "--certs", certificates / "operator", *out)
    assert nobody.code == 2
    assert "node 'cloud' is lost: no connection to 127.0.0.1:9" in nobody.err
    assert "'cloud' is not ID@HOST:PORT" in ecogen("watch", "cloud", "--certs", certificates / "operator", *out).err
    assert not (tmp_path / "run").exists()


SMALLER = [
    *("pretraining.steps=2", "model.num_blocks=3", "model.hidden_size=16"),
    *("model.intermediate_size=16", "tuning.rounds=1", "data.train=60", "evaluation.inversion=false"),
]


@pytest.mark.slow
def test_the_commands_of_the_documentation(tmp_path: Path) -> None:
    """Those of docs/by_hand.md, with a smaller recipe, this machine's address and free ports."""
    (block,) = re.findall(r"```\n(.*?)```", (ROOT / "docs" / "by_hand.md").read_text(), re.DOTALL)
    commands = [shlex.split(line) for line in block.replace("\\\n", "").splitlines() if line.startswith("ecogen")]
    ports = {port: free_port() for port in ("7000", "7001", "7002", "7003")}
    Image.new("L", (28, 28), 255).save(tmp_path / "seven.png")
    with ExitStack() as stack:
        for _, *arguments in commands:
            here = [of_this_machine(argument, ports) for argument in arguments]
            more = [part for value in SMALLER for part in ("--set", value)] if "--recipe" in here else []
            process = stack.enter_context(started(*here, *more, cwd=tmp_path))
            if arguments[0] == "node":
                address_of(process)
            else:
                said, errors = process.communicate(timeout=300)
                assert process.returncode == 0, errors
    assert "seven.png: " in said
    assert (tmp_path / "runs" / "by-hand" / "report.html").exists()


def of_this_machine(argument: str, ports: dict[str, int]) -> str:
    argument = re.sub(r"\b[\w-]+\.example\b|0\.0\.0\.0", "127.0.0.1", argument)
    return re.sub(r":(\d{4})$", lambda match: f":{ports[match[1]]}", argument)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
