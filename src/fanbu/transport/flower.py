"""Messages between centre and owners by Flower: a line over a ServerApp's grid.

Reference: Beutel et al. 2020, "Flower: a friendly federated learning framework".
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fanbu.errors import IntegrityError
from fanbu.transport.centre import Message
from fanbu.transport.parcel import MAX_BYTES, broken

_PAUSE, _GONE = 0.5, 20.0  # seconds between looks, and that a node may be out of sight


def to_record(said: Mapping[str, Any], files: Mapping[str, bytes]) -> Any:
    """What Flower carries: JSON, and files as arrays of bytes, which it cuts into pieces itself."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    if sum(map(len, files.values())) > MAX_BYTES:
        raise broken(f"a message is larger than {MAX_BYTES} bytes", sorted(files)[:3])
    record = RecordDict({"said": ConfigRecord({"json": json.dumps(said)})})
    if files:
        arrays = {n: Array(dtype="uint8", shape=(len(c),), stype="bytes", data=c) for n, c in files.items()}
        record["files"] = ArrayRecord(arrays)
    return record


def from_record(record: Any) -> Message:
    """JSON and files again. IntegrityError where it is no such message."""
    try:
        said = json.loads(str(record["said"]["json"]))
        files = {str(n): bytes(a.data) for n, a in record["files"].items()} if "files" in record else {}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise broken(f"a message cannot be read: {error}", type(error).__name__) from None
    if not isinstance(said, dict) or sum(map(len, files.values())) > MAX_BYTES:
        raise broken("a message is no object, or too large", type(said).__name__)
    return said, files


class FlowerLine:
    """A ``Line`` over Flower's grid. An owner is the node that last answered for its domain."""

    def __init__(self, grid: Any) -> None:
        self.grid = grid
        self.nodes: dict[str, int] = {}
        self.greeting: Message = ({}, {})

    def greet(self, request: Message, names: Iterable[str], seconds: float) -> Iterator[tuple[str, Message]]:
        """See ``Line``. All nodes are greeted anew: what they have may be other than before."""
        self.greeting, self.nodes = request, {}
        yield from self._newcomers(set(names), set(), seconds)

    def _newcomers(self, names: set[str], known: set[int], seconds: float) -> Iterator[tuple[str, Message]]:
        """Greets nodes that are not known, until all ``names`` have answered or time is over."""
        end = time.monotonic() + seconds
        waiting: dict[str, Any] = {}
        record = to_record(*self.greeting)
        while names and time.monotonic() < end:
            fresh = set(self.grid.get_node_ids()) - known
            known |= fresh
            waiting |= {self._push(node, record, seconds): node for node in fresh}
            for node, answer in self._pulled(waiting):
                if isinstance(answer, str):
                    continue
                for name, said in (answer[0].get("domains") or {}).items():
                    self.nodes[name] = node
                    names.discard(name)
                    yield name, (said, {})
            time.sleep(_PAUSE)

    def ask(self, requests: Mapping[str, Message], seconds: float) -> Iterator[tuple[str, Message | str]]:
        """See ``Line``. Who came back as another node is found again."""
        here = set(self.grid.get_node_ids())
        away = {d for d in requests if self.nodes.get(d) not in here}
        if away:
            for _ in self._newcomers(set(away), here & set(self.nodes.values()), min(seconds, _GONE)):
                pass
        end = time.monotonic() + seconds
        waiting: dict[str, str] = {}
        seen: dict[int, float] = {}
        for domain, request in requests.items():
            if (node := self.nodes.get(domain)) in here | set(self.grid.get_node_ids()) and node is not None:
                waiting[self._push(node, to_record(*request), seconds)] = domain
            else:
                yield domain, "its owner is not there"
        while waiting and time.monotonic() < end:
            yield from self._pulled(waiting)
            now, here = time.monotonic(), set(self.grid.get_node_ids())
            for sent, domain in list(waiting.items()):
                node = self.nodes[domain]
                seen[node] = now if node in here else seen.get(node, now)
                if now - seen[node] > _GONE:
                    del waiting[sent]
                    yield domain, "its owner went away"
            time.sleep(_PAUSE)
        for domain in waiting.values():
            yield domain, f"its owner did not answer within {seconds:g} s"

    def _push(self, node: int, record: Any, seconds: float) -> str:
        from flwr.app import Message as FlowerMessage

        message = FlowerMessage(record, dst_node_id=node, message_type="query", ttl=seconds)
        return str(next(iter(self.grid.push_messages([message]))))

    def _pulled(self, waiting: dict[str, Any]) -> Iterator[tuple[Any, Message | str]]:
        """Answers that have come, each with what ``waiting`` says of its question, which is taken out of it."""
        for reply in self.grid.pull_messages(list(waiting)) if waiting else ():
            whose = waiting.pop(str(reply.metadata.reply_to_message_id), None)
            if whose is None:
                continue
            if reply.has_error():
                yield whose, f"its owner's node failed: {reply.error.reason or reply.error.code}"[:500]
                continue
            try:
                yield whose, from_record(reply.content)
            except IntegrityError as error:
                yield whose, error.what
