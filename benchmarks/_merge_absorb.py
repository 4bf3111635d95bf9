"""One absorption of contributions on disk, in a process of its own; prints its times as JSON.

Arguments: METHOD OUT JSON BASE CONTRIBUTION...; their hashes are checked before the clock starts, and shown apart.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

began = time.perf_counter()
import transformers  # noqa: E402, F401 - needed to save, loaded before the clock starts

from fanbu import api  # noqa: E402
from fanbu.catalogue import method  # noqa: E402
from fanbu.contribution import open_contribution  # noqa: E402
from fanbu.model import open_model  # noqa: E402
from fanbu.types import Context  # noqa: E402


def main() -> None:
    name, out, settings, base, *folders = sys.argv[1:]
    code = method(name).code  # imported before the clock starts
    started = time.perf_counter()
    large = open_model(base, verify=False)
    _ = large.digest
    sent = [open_contribution(Path(folder)) for folder in folders]
    checked, cpu = time.perf_counter(), time.process_time()
    api.absorb(large, sent, out, Context(threads=2), method_name=name, **json.loads(settings))
    told = {
        "start-up": started - began, "hash of the inputs": checked - started, "merge": time.perf_counter() - checked,
        "cpu": time.process_time() - cpu, "module": code.__name__,
    }  # fmt: skip
    print(json.dumps(told))


if __name__ == "__main__":
    main()
