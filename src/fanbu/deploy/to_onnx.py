"""A model as an ONNX file, in float32 or smaller numbers, held against torch on real texts before it takes its name."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fanbu.batches import collate, encode, pad_id
from fanbu.errors import FitError, IntegrityError, UsageError, needs_extra
from fanbu.files import file_sha256, write_text
from fanbu.model import (
    MANIFEST,
    Model,
    load_network,
    load_tokenizer,
    model_files,
    read_json,
    verify_files,
    whole_or_not_at_all,
)
from fanbu.predict import longest
from fanbu.types import Context

Numbers = Literal["float32", "int8", "int8-static", "int4"]
ONNX = "model.onnx"
MAX_DIFFERENCE = 1e-3
_SAMPLE = 128
_BLOCK = 32
_LARGE = 1.5 * 2**30  # bytes, above which weights lie beside the file: a protobuf holds 2 GiB


@dataclass(frozen=True)
class OnnxModel:
    """A folder with ``model.onnx``, config.json, the tokenizer and a manifest, as ONNX Runtime and others load it."""

    path: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """Size of the network on disk."""
        return sum(p.stat().st_size for p in self.path.glob(f"{ONNX}*"))


def to_onnx(model: Model, out: Path, context: Context, texts: Sequence[str], numbers: Numbers = "float32") -> OnnxModel:
    """Writes a classifier or causal model as ONNX: input_ids and attention_mask [batch, tokens] to logits.

    Args:
        texts: what the result is held against torch on; static quantization measures ranges on them.
        numbers: ``float32``; ``int8``: weights in int8, activations quantized as they come (matrices and embeddings);
            ``int8-static``: activations in ranges that the texts showed; ``int4``: matrices in blocks of 32, weights
            only, all else in float32.

    Raises:
        UsageError: no texts. FitError: torch.export does not know the architecture.
        IntegrityError: float32 logits differ by more than 1e-3 of the largest logit (or of 1).
    """
    with needs_extra("onnx"):
        import_module("onnxscript")  # torch.onnx asks for it late
    if not texts:
        raise UsageError("no-texts", "export to ONNX has no texts to check it on", allowed="at least one text",
                         got=0, remedy="name a file of texts")  # fmt: skip
    network, tokenizer = in_factors(load_network(model), model), load_tokenizer(model)
    most = longest(network, tokenizer, context)
    sequences = encode(tokenizer, list(texts)[:_SAMPLE], most)
    batches = [collate(sequences[i : i + 8], pad_id(tokenizer)) for i in range(0, len(sequences), 8)]
    with whole_or_not_at_all(out) as partial:
        whole = partial / ONNX
        context.progress("export", 0, 3)
        export_network(network, batches[0], whole)
        context.progress("export", 1, 3)
        facts = _compared(network, whole, batches)
        if not facts["difference"] <= MAX_DIFFERENCE:
            raise IntegrityError(
                "export-differs", f"the ONNX file of {model.path} answers otherwise than torch",
                allowed=f"{MAX_DIFFERENCE} of the largest logit", got=facts["difference"],
                remedy="report this architecture",
            )  # fmt: skip
        if numbers != "float32":
            _quantize(whole, batches, numbers)
            facts |= {"agreement": _compared(network, whole, batches)["agreement"]}
        context.progress("export", 2, 3)
        for name in model_files(model.path):
            if not name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copyfile(model.path / name, partial / name)
        names = [*model_files(partial), *sorted(p.name for p in partial.glob(f"{ONNX}*"))]
        manifest = {
            "format": 1, "kind": "onnx", "numbers": numbers, "source": model.digest, "max_length": most,
            "verified": {**facts, "texts": len(sequences)},
            "files": {name: file_sha256(partial / name) for name in names},
        }  # fmt: skip
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
    context.progress("export", 3, 3)
    return open_onnx(out, verify=False)


def open_onnx(folder: Path, *, verify: bool = True) -> OnnxModel:
    """Opens what ``to_onnx`` wrote. Raises IntegrityError where a file is missing, changed or leads elsewhere."""
    config = read_json(folder / "config.json", "checkpoint-config")
    manifest = read_json(folder / MANIFEST, "manifest-broken")
    files, most = manifest.get("files"), manifest.get("max_length")
    if not (isinstance(files, dict) and ONNX in files and isinstance(most, int) and most > 0):
        raise IntegrityError(
            "manifest-broken", f"{folder / MANIFEST} names no {ONNX}, or no number of tokens", remedy="export it again"
        )
    if verify:
        verify_files(folder, files)
    return OnnxModel(folder, config, manifest)


def in_factors(network: Any, model: Model) -> Any:
    """Matrices that ``lowrank`` gave a low rank become two thin ones, in place; of other models nothing changes."""
    ranks = model.manifest.get("parameters", {}).get("ranks") if model.manifest.get("method") == "lowrank" else None
    if ranks:
        in_linear(network)
    for name, rank in (ranks or {}).items():
        path, _, last = name.removesuffix(".weight").rpartition(".")
        layer = getattr(network.get_submodule(path), last)
        if not isinstance(layer, nn.Linear):
            continue
        u, s, vh = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
        if rank < len(s) and float(s[rank]) > 1e-5 * float(s[0]):
            raise IntegrityError(
                "export-differs", f"{name} is not of the rank that its manifest says", allowed=rank,
                got=int((s > 1e-5 * s[0]).sum()), remedy="make the model again",
            )  # fmt: skip
        half = s[:rank].sqrt()
        first = nn.Linear(layer.in_features, rank, bias=False)
        second = nn.Linear(rank, layer.out_features, bias=layer.bias is not None)
        with torch.no_grad():
            first.weight.copy_(half[:, None] * vh[:rank])
            second.weight.copy_(u[:, :rank] * half)
            if layer.bias is not None:
                second.bias.copy_(layer.bias)
        setattr(network.get_submodule(path), last, nn.Sequential(first, second).eval())
    return network


def in_linear(network: Any) -> Any:
    """GPT-2's Conv1D become the linear layers that they are, in place; of other networks nothing changes."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, Conv1D):
            inputs, outputs = layer.weight.shape
            plain = nn.Linear(inputs, outputs, dtype=layer.weight.dtype)
            with torch.no_grad():
                plain.weight.copy_(layer.weight.T)
                plain.bias.copy_(layer.bias)
            network.set_submodule(name, plain.eval())
    return network


class _Logits(nn.Module):
    """The network with its inputs by position and its logits (or last hidden states) alone."""

    def __init__(self, network: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, tuple(names)

    def forward(self, *values: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(self.names, values, strict=True))
        if hasattr(self.network.config, "use_cache"):
            given["use_cache"] = False
        made = self.network(**given)
        result: Tensor = made.logits if "logits" in made else made.last_hidden_state
        return result


def export_network(network: Any, inputs: Mapping[str, Tensor], path: Path) -> None:
    """Any transformers network by torch.export; the first dimension of every input is free, and that of tokens."""
    names, free = list(inputs), torch.export.Dim.DYNAMIC
    # a dimension of 1 would be taken for a constant, and strides of a slice for numbers of their own
    values = tuple((v if len(v) > 1 else torch.cat([v, v])).contiguous() for v in inputs.values())
    shapes = tuple({0: free, 1: free} if v.ndim == 2 else {0: free} for v in values)
    wrapped = _Logits(network.to("cpu").eval(), names).eval()
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                wrapped, values, dynamic_shapes=(shapes,), input_names=names, output_names=["logits"], dynamo=True,
                verbose=False,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise FitError(
            "no-onnx", f"{type(network).__name__} does not export: {error.__cause__ or error}"[:400],
            remedy="serve it with torch",
        ) from None  # fmt: skip
    assert program is not None
    for node in program.model.graph:  # stack traces: most of a small file, and paths of this machine
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    program.model.graph.metadata_props.clear()
    program.model.metadata_props.clear()
    size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    program.save(str(path), external_data=size > _LARGE)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's notes about opsets and constants are nothing that a user can act on."""
    loggers = [logging.getLogger(n) for n in (None, "torch.onnx", "onnxscript", "onnx_ir")]  # None: the root
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def session(path: Path, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU, telemetry off."""
    with needs_extra("onnx"):
        import onnxruntime

    onnxruntime.disable_telemetry_events()
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if threads != 1 else "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(runs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits."""
    return torch.from_numpy(runs.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


def _compared(network: Any, path: Path, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """``difference``: max |z_onnx - z_torch| / max(1, max |z_torch|) of a batch, the largest; ``agreement``: how often
    the likeliest answer (next token) is torch's. Padding is left out."""
    runs, worst, same = session(path), 0.0, list[Tensor]()
    with torch.inference_mode():
        for batch in batches:
            known, got = network(**batch).logits.float(), run_session(runs, batch).float()
            if known.ndim == 3:
                keep = batch["attention_mask"].bool()
                known, got = known[keep], got[keep]
            off = (got - known).abs().max() / known.abs().max().clamp_min(1)
            worst = max(worst, float(off)) if off.isfinite() else float("inf")
            same.append(known.argmax(-1) == got.argmax(-1))
    return {"difference": worst, "agreement": float(torch.cat(same).double().mean())}


def _quantize(path: Path, batches: Sequence[Mapping[str, Tensor]], numbers: Numbers) -> None:
    """Replaces the float file by a quantized one."""
    with needs_extra("onnx"):
        import onnx
        from onnxruntime import quantization

    outside = sum(p.stat().st_size for p in path.parent.glob(f"{ONNX}*")) > _LARGE
    graph = onnx.load(str(path))
    del graph.graph.value_info[:]  # shapes noted by the exporter contradict transposed weights (see docs/log.md)
    # in folders of their own, so that files name their data as it will be called
    plain, small = path.parent / "plain" / ONNX, path.parent / "small" / ONNX
    plain.parent.mkdir()
    small.parent.mkdir()
    onnx.save(graph, str(plain), save_as_external_data=outside)
    weights = {"per_channel": True, "weight_type": quantization.QuantType.QInt8, "use_external_data_format": outside}
    with _quiet():
        if numbers == "int8":
            quantization.quantize_dynamic(str(plain), str(small), extra_options={"MatMulConstBOnly": True}, **weights)
        elif numbers == "int8-static":
            quantization.quantize_static(
                str(plain), str(small), _Reader(batches), quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm", "Gather"], activation_type=quantization.QuantType.QUInt8,
                extra_options={"MatMulConstBOnly": True}, **weights,
            )  # fmt: skip
        else:
            from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

            made = MatMulNBitsQuantizer(graph, bits=4, block_size=_BLOCK, is_symmetric=True, accuracy_level=4)
            made.process()
            made.model.save_model_to_file(str(small), use_external_data_format=outside)
    for left in path.parent.glob(f"{ONNX}*"):
        left.unlink()
    for new in small.parent.iterdir():
        new.rename(path.parent / new.name)
    shutil.rmtree(plain.parent)
    small.parent.rmdir()


class _Reader:
    """Texts for static ranges, one batch after the other."""

    def __init__(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.rest = iter([{n: v.numpy() for n, v in batch.items()} for batch in batches])

    def get_next(self) -> dict[str, Any] | None:
        """The next batch; None at the end."""
        return next(self.rest, None)
