"""How Flower is started for `flower`: `flwr run` on a SuperLink of its own, simulated or with SuperNodes."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PATIENCE_S = 600.0


@dataclass(frozen=True)
class Flower:
    """How Flower is run.

    Attributes:
        python: of the environment that it is installed in.
        is_deployed: with a SuperNode a client, not simulated.
        is_fast: with the fastest settings we found: one core a simulated client instead of two, so that two run at
            once on two cores; one thread a process; a SuperExec that looks for tasks every 10 ms instead of every
            second; no TLS.
    """

    python: Path
    is_deployed: bool
    is_fast: bool

    @property
    def has_tls(self) -> bool:
        """Where there is a network, by default."""
        return self.is_deployed and not self.is_fast

    def environment(self, home: Path) -> dict[str, str]:
        """Offline, without telemetry, and with nothing of the user's own Flower."""
        own = {
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        fast = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.01", "OMP_NUM_THREADS": "1"}
        return dict(os.environ) | own | (fast if self.is_fast else {})

    @property
    def federation(self) -> str:
        """What a simulated federation has besides the number of clients."""
        return "client-resources-num-cpus=1" if self.is_fast else ""


def run_app(flower: Flower, folder: Path, clients: int, rounds: int, settings: dict[str, str]) -> list[dict[str, Any]]:
    """Run the app, and return what its server wrote after each round into `rounds.jsonl`; its processes are left alone.

    Args:
        folder: an empty one.
        settings: of the app.

    Raises:
        RuntimeError: with the end of the logs, if not all rounds are done in time.
    """
    link_port, *node_ports = free_ports(1 + clients)
    link = f"127.0.0.1:{link_port}"
    certified = certify(folder) if flower.has_tls else None
    client = ["--root-certificates", str(certified)] if certified else ["--insecure"]
    write_connection(
        folder, {"address": link, **({"root-certificates": str(certified)} if certified else {"insecure": True})}
    )
    write_app(folder / "app", settings)
    environment = flower.environment(folder)

    def start(log: str, *command: str) -> subprocess.Popen[bytes]:
        with open(folder / f"{log}.log", "wb") as file:
            return subprocess.Popen(command, env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT)

    server = server_options(folder) if certified else ["--insecure"]
    runtime = [] if flower.is_deployed else ["--simulation"]
    superlink = start("superlink", "flower-superlink", "--port", str(link_port), *server, *runtime)
    try:
        wait_for_port(link_port, superlink)
        for index, port in enumerate(node_ports if flower.is_deployed else []):
            place = ["--superlink", link, "--port", str(port)]
            node = ["--node-config", f"partition-id={index} num-partitions={clients}"]
            start(f"supernode-{index}", "flower-supernode", *client, *place, *node)
        federation = ["--federation-config", f"num-supernodes={clients} {flower.federation}".strip()]
        options = [] if flower.is_deployed else federation
        app = start("run", "flwr", "run", str(folder / "app"), "here", "--stream", *options)
        return wait_for_rounds(folder / "rounds.jsonl", rounds, app)
    except TimeoutError as problem:
        logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log")))
        raise RuntimeError(f"Flower has not done {rounds} rounds (in at most {PATIENCE_S:g} s):\n{logs}") from problem


def write_app(folder: Path, settings: dict[str, str]) -> None:
    """A Flower app: `flower_job`, and what `flwr` wants to know of it."""
    folder.mkdir()
    (folder / "flower_job.py").write_text(Path(__file__).with_name("flower_job.py").read_text())
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "ecogen-tuning"\nversion = "1.0.0"\ndescription = "benchmark"\nlicense = "Apache-2.0"\n'
        'dependencies = []\n\n[tool.flwr.app]\npublisher = "ecogen"\n\n[tool.flwr.app.components]\n'
        'serverapp = "flower_job:server_app"\nclientapp = "flower_job:client_app"\n\n[tool.flwr.app.config]\n'
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    )


def write_connection(home: Path, connection: dict[str, str | bool]) -> None:
    """Flower's own configuration: where `flwr run` finds the SuperLink `here`."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in connection.items()]
    (home / "config.toml").write_text("\n".join(['[superlink]\ndefault = "here"\n\n[superlink.here]', *lines, ""]))


def certify(folder: Path) -> Path:
    """A certificate for 127.0.0.1, signed by itself, and its key, for the SuperLink; returns the certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "superlink")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
    places = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = builder.add_extension(places, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (folder / "superlink.pem").write_bytes(pem)
    (folder / "superlink.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "superlink.pem"


def server_options(folder: Path) -> list[str]:
    """A SuperLink's, with the certificate that `certify` wrote."""
    certificate, key = str(folder / "superlink.pem"), str(folder / "superlink.key")
    return ["--ssl-ca-certfile", certificate, "--ssl-certfile", certificate, "--ssl-keyfile", key]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [own.getsockname()[1] for own in sockets]
    for own in sockets:
        own.close()
    return ports


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until the process listens there.

    Raises:
        TimeoutError: if it does not.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise TimeoutError


def wait_for_rounds(path: Path, count: int, starter: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
    """The lines that the server wrote, once they are all there.

    Args:
        starter: `flwr run --stream`, which ends when the app has.

    Raises:
        TimeoutError: if they do not come in time, or the app ends without them.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    has_ended = False
    while time.monotonic() < deadline_s and not has_ended:
        has_ended = starter.poll() is not None  # asked first: what it wrote before its end is read below
        written = path.read_text().splitlines(keepends=True) if path.exists() else []
        if len(written) == count and written[-1].endswith("\n"):
            return [json.loads(line) for line in written]
        time.sleep(0.02)
    raise TimeoutError
