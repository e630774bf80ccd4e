"""A real SuperLink on loopback, with TLS and for known nodes alone, and nodes that join it."""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

EXAMPLE = Path(__file__).parents[2] / "examples" / "fleet"
LOOPBACK = "127.0.0.1"
_BIN = Path(sys.executable).parent
_LISTENING = "0A"


class Fleet:
    """Processes whose files are in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "home").mkdir(parents=True)
        with socket.socket() as found:
            found.bind((LOOPBACK, 0))
            self.port = int(found.getsockname()[1])
        self.environment = {
            **os.environ,
            "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}",  # Flower's commands start others
            "FLWR_HOME": str(root / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        _certificates(root)
        (root / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\n'
            f'address = "{LOOPBACK}:{self.port}"\nroot-certificates = "{root}/ca.pem"\n'
        )

    def superlink(self) -> subprocess.Popen[bytes]:
        """Start the server; what it knows of nodes is in a file, and so outlives it."""
        certificates = [f"--ssl-certfile={self.root}/server.pem"]
        certificates += [f"--ssl-keyfile={self.root}/server.key"]
        certificates += [f"--ssl-ca-certfile={self.root}/ca.pem"]
        where = ["--host", LOOPBACK, "--port", str(self.port), "--database", f"{self.root}/link.db"]
        more = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        started = self._started("flower-superlink", [*certificates, *where, *more], "superlink")
        self.wait(lambda: self._answers(started), "the SuperLink answers")
        return started

    def register(self, *names: str) -> None:
        """Make keys for nodes, and let the server know them."""
        for name in names:
            _write_node_key(self.root / f"{name}.key")
        with ThreadPoolExecutor() as pool:
            for done in [
                pool.submit(
                    self.flwr, "supernode", "register", f"{self.root}/{name}.key.pub", "here"
                )
                for name in names
            ]:
                done.result()

    def node(self, name: str, *options: str) -> subprocess.Popen[bytes]:
        """Start `pbc fleet join` on the photos in `name`-photos."""
        link = ["--superlink", f"{LOOPBACK}:{self.port}"]
        link += ["--private-key", f"{self.root}/{name}.key"]
        link += ["--root-certificates", f"{self.root}/ca.pem"]
        photos, out = self.root / f"{name}-photos", self.root / name
        words = ["fleet", "join", f"{self.root}/m.pbc", str(photos), "-o", str(out)]
        return self._started("pbc", [*words, *link, *options], name)

    def flwr(self, *words: str) -> str:
        """Run a command of Flower's."""
        done = subprocess.run(
            [str(_BIN / "flwr"), *words], env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, **config: object) -> None:
        """Start a run of the example's app."""
        values = [
            f'{name}="{value}"' if isinstance(value, str | Path) else f"{name}={value}"
            for name, value in config.items()
        ]
        self.flwr("run", str(EXAMPLE), "--run-config", " ".join(values))

    def said(self, name: str) -> str:
        """Return what a process printed."""
        path = self.root / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, until: Callable[[], bool], what: str, seconds: float = 300) -> None:
        """Wait for something; fails with what everybody said."""
        end = monotonic() + seconds
        while not until():
            assert monotonic() < end, f"waited for: {what}\n{self._everything()}"
            sleep(0.1)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill -9 the process itself; its children have to notice."""
        process.kill()
        process.wait()

    def sockets(self) -> tuple[set[str], set[str]]:
        """Return the addresses that anybody here listens on, and those that anybody talks to."""
        inodes = {inode for pid in self._everybody() for inode in _sockets(pid)}
        listening, talking = set(), set()
        for version in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{version}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[9] in inodes:
                    if fields[3] == _LISTENING:
                        listening.add(_address(fields[1]))
                    else:
                        talking.add(_address(fields[2]))
        return listening, talking

    def close(self) -> None:
        """End all that is left, and what it began."""
        for pid in self._everybody():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _started(self, command: str, words: Sequence[str], name: str) -> subprocess.Popen[bytes]:
        with (self.root / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(_BIN / command), *words],
                env=self.environment,
                stdout=log,
                stderr=log,
            )
        self._processes.append(process)
        return process

    def _answers(self, process: subprocess.Popen[bytes]) -> bool:
        assert process.poll() is None, self.said("superlink")
        with socket.socket() as probe:
            return probe.connect_ex((LOOPBACK, self.port)) == 0

    def _everybody(self) -> list[int]:
        """Return the processes that were started here, by whomever: Flower's leave the session."""
        mark = f"FLWR_HOME={self.root}/home".encode()
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # another user's, or it just ended
                if mark in environment.read_bytes().split(b"\0"):
                    found.append(int(environment.parent.name))
        return found

    def _everything(self) -> str:
        logs = sorted(self.root.glob("*.log")) + sorted(self.root.glob("*/fleet/*.log"))
        return "\n".join(f"== {log}\n{log.read_text()[-2000:]}" for log in logs)


def _sockets(pid: int) -> list[str]:
    """Return the inodes of a process's sockets."""
    found = []
    with suppress(OSError):  # it just ended
        for link in Path(f"/proc/{pid}/fd").iterdir():
            kind, _, inode = str(link.readlink()).partition(":")
            if kind == "socket":
                found.append(inode.strip("[]"))
    return found


def _address(text: str) -> str:
    digits = text.partition(":")[0]
    words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
    return str(ipaddress.ip_address(b"".join(words)))


def _certificates(root: Path) -> None:
    """Write an authority, and what it vouches for: a server on loopback."""
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    ca = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a fleet")])
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a fleet's server")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK))])
    usage = x509.BasicConstraints(ca=True, path_length=None)
    (root / "ca.pem").write_bytes(_signed(ca, ca, authority, authority, usage))
    (root / "server.pem").write_bytes(_signed(name, ca, server, authority, address))
    _write_key(root / "server.key", server)


def _signed(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    by: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> bytes:
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(extension, critical=True)
    return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))


def _write_node_key(path: Path) -> None:
    """Write what `ssh-keygen -t ecdsa -b 384` writes."""
    key, plain = ec.generate_private_key(ec.SECP384R1()), serialization.NoEncryption()
    private = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
    public = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    path.write_bytes(key.private_bytes(*private, plain))
    Path(f"{path}.pub").write_bytes(key.public_key().public_bytes(*public))
