"""Owners side by side on a Ray cluster, whose machines see the workspace under the same path.

Reference: Moritz et al. 2018, "Ray: a distributed framework for emerging AI applications".
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fanbu.errors import RetryError, UsageError, needs_extra
from fanbu.types import Transport

_SECONDS = 10.0


def results(
    transport: Transport, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], threads: int
) -> Iterator[Any]:
    """See ``transport.side_by_side``. A call asks for as many processors as it has threads.

    Raises RetryError where the cluster is out of reach, or a worker died; UsageError where no machine of it has so many
    processors.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported: a cluster takes orders from anybody
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with needs_extra("ray"):
        import ray
    if not ray.is_initialized():
        _connect(ray, transport, threads)
    most = max((n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]), default=0)
    if threads > most:
        raise UsageError(
            "too-many-threads", "no machine of the Ray cluster has so many processors", allowed=f"threads: {most:g}",
            got=threads, remedy="set threads in the recipe, or start the cluster with more",
        )  # fmt: skip
    remote = ray.remote(num_cpus=max(1, threads), max_retries=0)(function)
    waiting = [remote.remote(*call) for call in calls]
    try:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(done[0])
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except ray.exceptions.RayError as error:
        raise RetryError(
            "worker-killed", f"an owner's work on the Ray cluster was cut off: {error}",
            remedy="run again: finished work is kept",
        ) from None  # fmt: skip
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _connect(ray: Any, transport: Transport, threads: int) -> None:
    settings: dict[str, Any] = {"address": transport.address, "log_to_driver": False, "logging_level": "ERROR"}
    if transport.address is None:  # its workers find what is found here
        os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        settings |= {"num_cpus": transport.processes * max(1, threads), "include_dashboard": False}
    try:
        _reach(transport.address or "auto")
        ray.init(**settings)
    except (OSError, RuntimeError, ValueError) as error:
        raise RetryError(
            "ray-out-of-reach", f"no Ray cluster answers at {transport.address or 'this machine'}: {error}",
            remedy="start it (`ray start --head`), give its address, and set RAY_AUTH_TOKEN to its token",
        ) from None  # fmt: skip


def _reach(address: str) -> None:
    """Ray itself waits for ever for a cluster that does not answer."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS).close()
