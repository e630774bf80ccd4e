"""A real sshd on loopback, with its own keys, port and settings: the board that deploys go to."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
SSH = shutil.which("ssh")
MISSING = "needs sshd and ssh: apt-get install openssh-server openssh-client"


@dataclass(frozen=True)
class Board:
    """A running sshd: what `ssh` needs to reach it, and the folder to deploy to."""

    home: Path
    port: int
    known_hosts: Path
    key: Path

    @property
    def destination(self) -> str:
        return f"{getpass.getuser()}@127.0.0.1:{self.root}"

    @property
    def root(self) -> Path:
        return self.home / "pbc"

    @property
    def options(self) -> tuple[str, ...]:
        return (
            "-F", "none", "-p", str(self.port), "-i", str(self.key), "-oIdentitiesOnly=yes",
            f"-oUserKnownHostsFile={self.known_hosts}", "-oStrictHostKeyChecking=yes",
        )  # fmt: skip


@contextmanager
def board(
    folder: Path, *, under: Sequence[str] = (), settings: Mapping[str, str] | None = None
) -> Iterator[Board]:
    """Start sshd in a folder of its own, and end it with the block.

    under: words in front of its command. settings: of the environment of those who log in.
    """
    assert SSHD is not None
    host_key, user_key = folder / "host_key", folder / "user_key"
    for key in (host_key, user_key):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    port = _free_port()
    known_hosts = folder / "known_hosts"
    public = host_key.with_suffix(".pub").read_text()
    known_hosts.write_text(f"[127.0.0.1]:{port} {public}")
    config = folder / "sshd_config"
    given = {
        "PATH": f"{folder}/bin:{Path(sys.executable).parent}:/usr/bin:/bin",
        "PBC_CACHE": f"{folder}/cache",
        "OMP_NUM_THREADS": "1",
        **(settings or {}),
    }
    environment = " ".join(f"{name}={value}" for name, value in given.items())
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {host_key}\nPidFile {folder}/pid\n"
        f"AuthorizedKeysFile {user_key}.pub\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
        f"SetEnv {environment}\n"
    )
    (folder / "bin").mkdir()
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where root's sshd separates its privileges
    log = (folder / "sshd.log").open("wb")
    process = subprocess.Popen(
        [*under, SSHD, "-D", "-e", "-f", str(config)],
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process, folder / "sshd.log")
        yield Board(folder, port, known_hosts, user_key)
    finally:
        os.kill(int((folder / "pid").read_text()), signal.SIGTERM)  # not who it runs under
        process.wait()
        log.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"sshd does not listen: {log.read_text()}")
