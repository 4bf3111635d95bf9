"""Flower's own programs, started for a centre (SuperLink, one run) and for an owner (SuperNode)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fanbu.errors import FanbuError, RetryError, UsageError, needs_extra
from fanbu.progress import log
from fanbu.recipe import load_recipe
from fanbu.record import read_record, record_folder
from fanbu.serve.apps import RESULT
from fanbu.serve.worker import kept

_START, _AGAIN = 60.0, 5.0  # seconds: that a SuperLink may take to answer, and before a SuperNode tries again
_PROJECT = """[project]
name = "fanbu-rounds"
version = "1.0.0"
description = "Rounds of fanbu"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fanbu"

[tool.flwr.app.components]
serverapp = "fanbu_rounds.server:app"
clientapp = "fanbu_rounds.client:app"

[tool.flwr.app.config]
recipe = ""
changes = "[]"
"""


@dataclass(frozen=True)
class Security:
    """Who may listen and who may join. ``certificate``, ``key`` and ``ca`` are PEM files of the centre's TLS; without
    them all is in the clear, which ``insecure`` has to say. ``owners`` are public keys of those who may join; where
    there are none, anybody may."""

    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    owners: Sequence[Path] = ()
    insecure: bool = False

    def __post_init__(self) -> None:
        given = [f for f in (self.certificate, self.key, self.ca) if f is not None]
        if len(given) != (0 if self.insecure else 3):
            raise UsageError(
                "tls", "a connection is either encrypted or not",
                allowed="--certificate, --key and --ca, or --insecure", got=[str(f) for f in given],
                remedy="make a certificate (docs/federation.md says how)",
            )  # fmt: skip
        for file in (*given, *self.owners):
            if not file.is_file():
                raise UsageError("no-file", "there is no such file", got=file, remedy="check the path")

    @property
    def flags(self) -> list[str]:
        """A SuperLink's."""
        flags = ["--enable-supernode-auth"] if self.owners else []
        if self.insecure:
            return ["--insecure", *flags]
        named = {"--ssl-certfile": self.certificate, "--ssl-keyfile": self.key, "--ssl-ca-certfile": self.ca}
        return [*(str(part) for pair in named.items() for part in pair), *flags]


@contextmanager
def opened(
    recipe: Path, changes: Sequence[str], host: str, port: int, security: Security
) -> Iterator[Callable[[], dict[str, Any]]]:  # fmt: skip
    """A centre that owners join at ``host:port``. What it gives runs the rounds that are to be run, as often as it is
    called, and returns the last one's record; it raises what stopped them.

    Raises RetryError where Flower did not start.
    """
    loaded = load_recipe(recipe, changes)
    if loaded.transport.kind != "flower":
        raise UsageError(
            "owners-elsewhere", "the owners of this recipe are here", allowed="transport: {kind: flower}",
            got=loaded.transport.kind, remedy="use `fanbu run`",
        )  # fmt: skip
    root = Path(loaded.workspace).resolve()
    folder = root / "flower"
    folder.mkdir(parents=True, exist_ok=True)
    app, environment = _app(folder), _environment(folder / "home")
    _connection(folder / "home", host, port, security)
    with _superlink(folder, host, port, security, environment):
        for key in security.owners:
            _call(["supernode", "register", str(key), "centre"], environment)
        config = f"recipe={json.dumps(str(recipe.resolve()))} changes={json.dumps(json.dumps(list(changes)))}"
        command = [*_flower("flwr"), "run", str(app), "centre", "--stream", "--run-config", config]
        yield partial(_rounds, root, command, environment)


def _rounds(root: Path, command: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    ended, folder = root / RESULT, root / "flower"
    ended.unlink(missing_ok=True)
    subprocess.run(command, env=environment, stdout=sys.stderr, check=False)
    if not ended.exists():
        raise RetryError(
            "flower-ended", "Flower ended before the rounds did", got=folder / "superlink.log",
            remedy="look into its log, then run again: what was finished is kept",
        )  # fmt: skip
    said: dict[str, Any] = json.loads(ended.read_text())
    if error := said.get("error"):
        raise _again(error)
    record = read_record(record_folder(root, said["key"]))
    assert record is not None
    return {**record, "workspace": str(root)}


def join(
    centre: str, part: Path, workspace: Path, ca: Path | None, key: Path | None, trusted: Path | None, insecure: bool
) -> NoReturn:
    """An owner's SuperNode, until this process is ended. One that was not let in (the centre may not have told Flower
    of its key yet) tries again."""
    if insecure == (ca is not None):
        raise UsageError(
            "tls", "a connection is either encrypted or not", allowed="--ca, or --insecure", got=ca,
            remedy="ask the centre for its CA certificate",
        )  # fmt: skip
    workspace.mkdir(parents=True, exist_ok=True)
    environment = _environment(workspace / "flower")
    config = {"part": str(part.resolve()), "workspace": str(workspace.resolve())}
    told = " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
    command = [
        *_flower("flower-supernode"), "--superlink", centre, "--port", str(_free_port()), "--node-config", told,
        *(["--insecure"] if insecure else ["--root-certificates", str(ca)]),
        *(["--auth-supernode-private-key", str(key)] if key else []),
        *(["--trusted-entities", str(trusted)] if trusted else []),
    ]  # fmt: skip
    with kept(part.resolve(), workspace.resolve()):
        while True:
            with _ended_with_us(subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent)) as process:
                code = process.wait()
            log(f"Flower's SuperNode ended ({code}); once more in {_AGAIN:g} s")
            time.sleep(_AGAIN)


def _again(error: Mapping[str, Any]) -> FanbuError:
    """The error that stopped the rounds, with its exit code."""
    kind = next((k for k in FanbuError.__subclasses__() if k.exit_code == error["exit"]), FanbuError)
    parts = {key: error[key] for key in ("allowed", "got", "remedy")}
    return kind(error["code"], error["what"], **parts)


def _flower(name: str) -> list[str]:
    """One of Flower's programs: beside this Python, else where programs are looked for."""
    with needs_extra("flower"):
        import flwr  # noqa: F401
    found = shutil.which(name, path=_paths())
    if found is None:
        raise UsageError(
            "extra-missing", f"Flower's program {name} is not found", allowed="beside Python, or on PATH",
            got=_paths(), remedy="pip install 'fanbu[flower]' where fanbu runs",
        )  # fmt: skip
    return [found]


def _paths() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _environment(home: Path) -> dict[str, str]:
    """Of Flower's programs: no telemetry, nothing installed while they run, and their state in ``home``."""
    home.mkdir(parents=True, exist_ok=True)
    own = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(home), "UV_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **own, "PATH": _paths()}


def _app(folder: Path) -> Path:
    """The app that Flower ships to owners: two lines that import fanbu, which is installed there."""
    app = folder / "app"
    shutil.rmtree(app, ignore_errors=True)
    (app / "fanbu_rounds").mkdir(parents=True)
    (app / "pyproject.toml").write_text(_PROJECT)
    (app / "fanbu_rounds" / "__init__.py").write_text("")
    for name in ("server", "client"):
        (app / "fanbu_rounds" / f"{name}.py").write_text(f"from fanbu.serve.apps import {name}\n\napp = {name}()\n")
    return app


def _connection(home: Path, host: str, port: int, security: Security) -> None:
    """Tells `flwr` where the SuperLink is."""
    trust = (
        "insecure = true"
        if security.insecure
        else f"root-certificates = {json.dumps(str(security.ca and security.ca.resolve()))}"
    )
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "centre"\n\n[superlink.centre]\naddress = "{_reached(host)}:{port}"\n{trust}\n'
    )


def _reached(host: str) -> str:
    return "127.0.0.1" if host in {"0.0.0.0", "::"} else host


@contextmanager
def _superlink(
    folder: Path, host: str, port: int, security: Security, environment: Mapping[str, str]
) -> Iterator[None]:  # fmt: skip
    command = [*_flower("flower-superlink"), "--host", host, "--port", str(port), *security.flags]
    command.append("--disable-runtime-dependency-installation")
    with (folder / "superlink.log").open("w") as told:
        process = subprocess.Popen(
            command, env=environment, stdout=told, stderr=told, start_new_session=True, preexec_fn=_end_with_parent
        )  # fmt: skip
    with _ended_with_us(process):
        _wait(_reached(host), port, process, folder / "superlink.log")
        yield


@contextmanager
def _ended_with_us(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Whatever ends this, ends the process."""
    ends = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(one, lambda number, frame: sys.exit(128 + number)) for one in ends]
    try:
        yield process
    finally:
        for one, handler in zip(ends, before, strict=True):
            signal.signal(one, handler)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _end_with_parent() -> None:
    """In a process that was just started: where Linux can, it is ended when the one that started it is killed."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait(host: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection((host, port), 1.0).close()
            return
        except OSError:
            time.sleep(0.3)
    raise RetryError(
        "flower-not-started", "Flower's SuperLink did not start", got=log, remedy="look into its log; is the port free?"
    )


def _call(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    done = subprocess.run([*_flower("flwr"), *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(
            "flower-refused", f"flwr {' '.join(arguments)} failed", got=(done.stdout + done.stderr)[-300:],
            remedy="check the key: an elliptic curve key in OpenSSH form (docs/federation.md says how)",
        )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
