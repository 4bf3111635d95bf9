"""Owners side by side: the same bytes as one after the other, and errors that come back as they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import tiny_recipe
from fanbu.catalogue import Method, method
from fanbu.errors import DataError, RetryError, UsageError
from fanbu.generations import run
from fanbu.recipe import load_recipe
from fanbu.transport import side_by_side
from fanbu.transport.local import _pool
from fanbu.types import Transport

TWO = Transport(processes=2)


def square(x: int) -> int:
    return x * x


def refuse(x: int) -> int:
    raise DataError("bad-row", f"row {x} is bad", allowed=["a", "b"], got=x, remedy="mend it")


def pid(x: int) -> int:
    return os.getpid()


def summary(way: Method) -> str:
    return way.summary


def die(x: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return x


def champion(folder: Path, *changes: str) -> dict[str, Any]:
    folder.mkdir()
    tiny_recipe(folder)
    lines: list[str] = []
    record = run(load_recipe(folder / "recipe.yaml", changes), log=lines.append)
    return {"record": record, "log": lines}


def test_results_come_as_they_end_and_errors_as_they_were() -> None:
    assert sorted(side_by_side(TWO, square, [(i,) for i in range(5)], 1)) == [0, 1, 4, 9, 16]
    with pytest.raises(DataError) as caught:
        list(side_by_side(TWO, refuse, [(3,)], 1))
    assert (
        caught.value.as_dict()
        == DataError("bad-row", "row 3 is bad", allowed=["a", "b"], got=3, remedy="mend it").as_dict()
    )


def test_a_process_that_is_killed_is_told_of() -> None:
    with pytest.raises(RetryError, match="killed"):
        list(side_by_side(TWO, die, [(1,), (2,)], 1))
    assert list(side_by_side(TWO, square, [(3,)], 1)) == [9]  # others begin in its place


def test_a_process_that_dies_idle_is_replaced() -> None:
    assert list(side_by_side(TWO, square, [(3,)], 1)) == [9]
    pool = _pool(2)
    for process in list(pool._processes.values()):
        process.kill()
        process.join()
    deadline = time.monotonic() + 20
    while not pool._broken and time.monotonic() < deadline:  # its thread sees it a moment later
        time.sleep(0.01)
    assert sorted(side_by_side(TWO, square, [(2,), (3,)], 1)) == [4, 9]


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_transport import TWO, pid\n"
        "from fanbu.transport import side_by_side\n"
        "if __name__ == '__main__':\n"
        "    print(*side_by_side(TWO, pid, [(1,), (2,)], 1), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    said = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    workers = {int(word) for word in said.stdout.split()}
    assert workers
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(w) for w in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(w) and psutil.Process(w).status() != "zombie" for w in workers)


def test_methods_travel() -> None:
    way = method("fedavg")
    assert way.code
    assert list(side_by_side(TWO, summary, [(way,)], 1)) == [way.summary]


@pytest.mark.slow
def test_a_round_side_by_side_makes_the_same_champion(tmp_path: Path) -> None:
    federated = "feedback={method: fedavg, times: 2, train: {epochs: 1, batch_size: 8}}"
    alone = champion(tmp_path / "alone", federated)["record"]
    both = champion(tmp_path / "both", federated, "transport.processes=2")
    record = both["record"]
    assert record["candidate"]["digest"] == alone["candidate"]["digest"]
    assert record["verdict"] == alone["verdict"]
    assert any("owners side by side" in line for line in both["log"])
    assert not any(cost["reused"] for cost in record["costs"])


def test_an_address_is_that_of_a_cluster(tmp_path: Path) -> None:
    tiny_recipe(tmp_path)
    with pytest.raises(UsageError, match="Ray cluster"):
        load_recipe(tmp_path / "recipe.yaml", ["transport.address=auto"])
    with pytest.raises(UsageError):
        load_recipe(tmp_path / "recipe.yaml", ["transport.processes=0"])


def test_a_cluster_that_does_not_answer_is_told_of() -> None:
    with pytest.raises(RetryError, match="no Ray cluster answers"):
        list(side_by_side(Transport("ray", address="127.0.0.1:1"), square, [(1,)], 1))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Transport]:
    transport = Transport("ray", processes=2)
    assert list(side_by_side(transport, square, [(2,)], 1)) == [4]
    ray = sys.modules["ray"]
    yield transport
    ray.shutdown()


@pytest.mark.slow
def test_a_ray_cluster_asks_for_a_token_and_gives_errors_as_they_were(cluster: Transport) -> None:
    assert sorted(side_by_side(cluster, square, [(i,) for i in range(5)], 1)) == [0, 1, 4, 9, 16]
    assert os.environ["RAY_AUTH_MODE"] == "token"
    with pytest.raises(DataError, match="row 3 is bad"):
        list(side_by_side(cluster, refuse, [(3,)], 1))
    with pytest.raises(RetryError):
        list(side_by_side(cluster, die, [(3,)], 1))
    with pytest.raises(UsageError, match="so many processors"):
        list(side_by_side(cluster, square, [(3,)], 1000))


@pytest.mark.slow
def test_a_round_on_ray_makes_the_same_champion(tmp_path: Path, cluster: Transport) -> None:
    alone = champion(tmp_path / "alone")["record"]
    record = champion(tmp_path / "ray", "transport={kind: ray, processes: 2}")["record"]
    assert record["candidate"]["digest"] == alone["candidate"]["digest"]
    assert record["verdict"] == alone["verdict"]
    assert not any(cost["reused"] for cost in record["costs"])
