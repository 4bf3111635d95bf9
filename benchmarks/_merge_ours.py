"""One merge by fanbu in a process of its own; prints its times as JSON. Arguments: METHOD OUT JSON BASE SPECIALIST."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

began = time.perf_counter()
import transformers  # noqa: E402, F401 - needed to save, loaded before the clock starts

from fanbu import api  # noqa: E402
from fanbu.catalogue import method  # noqa: E402
from fanbu.model import open_model  # noqa: E402
from fanbu.types import Context  # noqa: E402


def main() -> None:
    name, out, settings, base, *specialists = sys.argv[1:]
    code = method(name).code  # imported before the clock starts
    started, cpu = time.perf_counter(), time.process_time()
    large = open_model(base, verify=False)
    _ = large.digest
    hashed = time.perf_counter()
    folders = {Path(s).name: s for s in specialists}
    api.merge(large, folders, out, Context(threads=2), method_name=name, **json.loads(settings))
    ended = time.perf_counter()
    told = {
        "start-up": started - began, "hash of the base": hashed - started, "merge": ended - hashed,
        "cpu": time.process_time() - cpu, "module": code.__name__,
    }  # fmt: skip
    print(json.dumps(told))


if __name__ == "__main__":
    main()
