"""FusionBench's own functions on state dicts, run by its environment's interpreter. Prints its times as JSON.

Arguments: METHOD OUT JSON BASE SPECIALIST...; METHOD is tsv, iso, wudi or regmean, OUT a safetensors file. Task vectors
are taken in float32, because its SVDs know no bfloat16; the result is stored in the base's dtype. JSON: ``only`` (a
part of the names: other tensors are left out), and for regmean ``grams`` (a safetensors file of each specialist),
``leaders`` (the Gram matrix of each weight), ``prefix`` (before their names there) and ``ratio`` (of the off-diagonal).
"""

from __future__ import annotations

import json
import sys
import time

began = time.perf_counter()
import torch  # noqa: E402
from fusion_bench.method.isotropic_merging.iso_utils import iso_c  # noqa: E402
from fusion_bench.method.regmean.regmean import merging_with_regmean_weights  # noqa: E402
from fusion_bench.method.task_singular_vector.utils import TSVM_utils  # noqa: E402
from fusion_bench.method.wudi.wudi import wudi_merging  # noqa: E402
from fusion_bench.utils.state_dict_arithmetic import state_dict_add, state_dict_sub  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

EMBEDDINGS = ["model.embed_tokens.weight"]  # merged by averaging, as ours does

State = dict[str, torch.Tensor]


def load(folder: str, only: str) -> State:
    """A checkpoint in float32."""
    return {n: t.float() for n, t in load_file(f"{folder}/model.safetensors").items() if only in n}


def by_task_vectors(method: str, base: State, specialists: list[State]) -> State:
    """The base with the merged task vector added."""
    vectors = [state_dict_sub(s, base) for s in specialists]
    specialists.clear()
    if method == "tsv":
        found = TSVM_utils.compute_and_sum_svd_mem_reduction(vectors, exclude_keys=EMBEDDINGS, accelerator="cpu")
    elif method == "iso":
        found = iso_c(vectors, accelerator="cpu", exclude_keys=EMBEDDINGS)
    else:
        found = {n: t.detach() for n, t in wudi_merging(vectors, accelerator="cpu", exclude_keys=EMBEDDINGS).items()}
    return state_dict_add(base, found)


def by_grams(specialists: list[State], settings: dict) -> State:
    """RegMean from Gram matrices that are there already."""
    weights = []
    for file in settings["grams"]:
        own = load_file(file)
        leaders = {n: g for n, g in settings["leaders"].items() if n in specialists[0]}
        weights.append({n.removesuffix(".weight"): own[settings["prefix"] + g] for n, g in leaders.items()})
    listed = {n: [s[n] for s in specialists] for n in specialists[0]}
    with torch.no_grad():
        return merging_with_regmean_weights(listed, weights, settings["ratio"])


def main() -> None:
    method, out, text, base_folder, *folders = sys.argv[1:]
    settings = json.loads(text)
    only = settings.get("only", "")
    stored = load_file(f"{base_folder}/model.safetensors")
    dtypes = {n: t.dtype for n, t in stored.items()}
    del stored
    started, cpu = time.perf_counter(), time.process_time()
    base, specialists = load(base_folder, only), [load(f, only) for f in folders]
    loaded = time.perf_counter()
    found = by_grams(specialists, settings) if method == "regmean" else by_task_vectors(method, base, specialists)
    merged = time.perf_counter()
    save_file({n: t.to(dtypes[n]).contiguous() for n, t in found.items()}, out)
    told = {
        "start-up": started - began, "load": loaded - started, "compute": merged - loaded,
        "merge": time.perf_counter() - started, "cpu": time.process_time() - cpu,
    }  # fmt: skip
    print()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
