"""The causal part of benchmarks/shrink.py: a small Llama of the standard library's documentation, halved."""

from __future__ import annotations

import ast
import json
import math
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from _causal import LENGTH, pretrained
from _common import bar, table
from fanbu.catalogue import method
from fanbu.domain import Domain, load_domain
from fanbu.ledger import Workspace
from fanbu.model import Model, load_network, load_tokenizer, open_model, provenance, save_network
from fanbu.predict import token_losses
from fanbu.types import Context, Train


def documentation(folder: Path, quick: bool) -> Domain:
    """Docstrings of Python's standard library, a fifth for testing."""
    texts = dict[str, None]()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        if {"test", "tests", "idlelib", "site-packages", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= 80:
                    texts[text[:1200]] = None
    rows = list(texts)[: 1200 if quick else None]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "docs.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in rows), encoding="utf-8")
    return load_domain("docs", train=str(folder / "docs.jsonl"), valid=0.05, test=0.2, task="causal-lm")


def perplexity(model: Model, domain: Domain, context: Context) -> float:
    """On test texts."""
    total, count = token_losses(load_network(model), load_tokenizer(model), domain.test.texts, context).sum(0)
    return math.exp(float(total / count))


def causal(quick: bool, work: Path, context: Context) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Table, values and bars."""
    context = replace(context, max_length=LENGTH)
    domain = documentation(work / "docs", quick)
    ledger = Workspace(work / "shrink")
    plan = {"epochs": 1 if quick else 2, "batch_size": 16, "lr": 1e-3, "patience": 0}

    def stage(name: str, module: str, inputs: dict[str, Any], make: Any) -> Model:
        inputs = {**inputs, "domain": domain.digest, "seed": context.seed, "quick": quick}

        def produce(out: Path, scratch: Path) -> None:
            make(out / "model", replace(context, scratch=scratch))

        return open_model(ledger.stage(f"causal {name}", module, inputs, produce).path / "model")

    training = Train(epochs=3 if quick else 8, batch_size=16, lr=2e-3, patience=0)
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6}
    whole = stage(
        "large", "fanbu.train", {"plan": vars(training), "sizes": sizes},
        lambda out, c: pretrained(out, list(domain.train.texts), c, training, **sizes),
    )  # fmt: skip
    half = stage(
        "width", "fanbu.shrink.width", {"parent": whole.digest},
        lambda out, c: method("width").shrink(
            whole, domain, out, c, neurons=0.2, channels=0.6, parameters=0.5, train=None
        ),
    )  # fmt: skip
    distil = method("distill", "shrink").shrink
    taught = {"teacher": str(whole.path), "temperature": 1.0, "train": plan}
    made = {"large": whole, "cut to half, nothing trained": half}
    made["cut to half and distilled (ours)"] = stage(
        "distill", "fanbu.shrink.distill", {"parent": half.digest, "plan": plan},
        lambda out, c: distil(half, domain, out, c, **taught),
    )  # fmt: skip

    def fresh(out: Path, c: Context) -> Model:
        torch.manual_seed(c.seeded("scratch"))
        network = type(load_network(half))(load_network(half).config)
        return save_network(network, load_tokenizer(half), out, provenance("scratch", [], c))

    empty = stage("fresh", "fanbu.model", {"like": half.digest}, fresh)
    made["from scratch, distilled as long"] = stage(
        "scratch distilled", "fanbu.shrink.distill", {"parent": empty.digest, "plan": plan},
        lambda out, c: distil(empty, domain, out, c, **taught),
    )  # fmt: skip
    made["from scratch, trained as long"] = stage(
        "scratch trained", "fanbu.shrink.finetune", {"parent": empty.digest, "plan": plan},
        lambda out, c: method("finetune").shrink(empty, domain, out, c, train=plan),
    )  # fmt: skip
    values = {n: {"perplexity": perplexity(m, domain, context), "parameters": m.parameters} for n, m in made.items()}
    rows = [["causal model of documentation", "parameters", "test perplexity"]]
    rows += [[n, f"{v['parameters']:,}", f"{v['perplexity']:.2f}"] for n, v in values.items()]
    ours = values["cut to half and distilled (ours)"]["perplexity"]
    best = min(v["perplexity"] for n, v in values.items() if n.startswith("from scratch"))
    ratio = half.parameters / whole.parameters
    bars = [
        bar("causal: size beside the large model", f"{ratio:.3f}", "<= 0.5", ratio <= 0.5),
        bar("causal: perplexity at 1/2 beside the better of from scratch", f"{ours:.2f}", f"< {best:.2f}", ours < best),
    ]
    return table(rows), values, bars
