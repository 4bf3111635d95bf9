"""Merges by mergekit in a process of its own. Prints their times as JSON. Arguments: OUT CONFIG [OUT CONFIG ...]."""

from __future__ import annotations

import json
import sys
import time

began = time.perf_counter()
import yaml  # noqa: E402
from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.merge import MergeOptions, run_merge  # noqa: E402


def main() -> None:
    wanted = []
    for config in sys.argv[2::2]:
        with open(config) as stream:
            wanted.append(MergeConfiguration.model_validate(yaml.safe_load(stream)))
    started, cpu = time.perf_counter(), time.process_time()
    for out, one in zip(sys.argv[1::2], wanted, strict=True):
        run_merge(one, out, MergeOptions(copy_tokenizer=False, quiet=True))
    ended = time.perf_counter()
    print(json.dumps({"start-up": started - began, "merge": ended - started, "cpu": time.process_time() - cpu}))


if __name__ == "__main__":
    main()
