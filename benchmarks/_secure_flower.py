"""What an owner of Flower's SecAgg+ does to its arrays, in a process with Flower alone; prints its times as JSON.

Arguments: the number of neighbours, and a file of tensors. Rounded to its defaults (22 bits of a range of -8 to 8,
sums modulo 2^32); loading is not timed. Its masks grow from a seed of which 32 bits are kept.
"""

from __future__ import annotations

import json
import os
import sys
import time

from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from safetensors.torch import load_file

CLIP, TARGET, MODULUS = 8.0, 2**22, 2**32


def main() -> None:
    neighbours, path = int(sys.argv[1]), sys.argv[2]
    arrays = [t.float().numpy() for t in load_file(path).values()]
    shapes = [a.shape for a in arrays]
    started = time.perf_counter()
    total = [q.astype("int64") for q in quantize(arrays, CLIP, TARGET)]
    for number in range(neighbours + 1):  # one is its own
        for part, mask in zip(total, pseudo_rand_gen(os.urandom(32), MODULUS, shapes), strict=True):
            part += mask if number % 2 else -mask
    for part in total:
        part &= MODULUS - 1
    told = {
        "seconds": time.perf_counter() - started,
        "mb": sum(p.nbytes for p in total) / 1e6,
        "step": 2 * CLIP / TARGET,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
