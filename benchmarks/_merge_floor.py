"""The floor of a merge: reads files with two threads, then writes as many bytes as the first has; prints its times.

It imports what a merge imports before the clock starts, so that the machine is in the same state. Arguments: OUT FILES.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence

began = time.perf_counter()
import transformers  # noqa: E402, F401

BLOCK = 2**22


def read(files: Sequence[str]) -> None:
    """All bytes of some files, into the same memory again and again."""
    room = bytearray(BLOCK)
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        while os.readv(handle, [room]):
            pass
        os.close(handle)


def main() -> None:
    out, *files = sys.argv[1:]
    block, size = os.urandom(BLOCK), os.stat(files[0]).st_size
    started, cpu = time.perf_counter(), time.process_time()
    threads = [threading.Thread(target=read, args=(files[k::2],)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    was_read = time.perf_counter()
    with open(out, "wb") as stream:
        for start in range(0, size, BLOCK):
            stream.write(block[: size - start])
        stream.flush()
        written = time.perf_counter()
        os.fsync(stream.fileno())
    ended = time.perf_counter()
    os.unlink(out)
    print(json.dumps({
        "start-up": started - began, "read": was_read - started, "write": written - was_read,
        "fsync": ended - written, "merge": ended - started, "cpu": time.process_time() - cpu,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
