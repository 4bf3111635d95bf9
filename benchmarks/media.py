"""Images and recordings: what specialists of alphabets and of speakers say, fed back to one network.

Bodies are taught made-up glyphs and words first (``_media_bodies``): a small ViT for the images, a 1-D convolution
with a transformer on top (wav2vec 2.0's) for the sounds. Specialists are fine-tuned from the probed large body; small
ones from one of half the depth and width; the large one then learns from their panels on the domains' training rows.
Only multitask sees labels. Rows are few, so owners add four copies of each training row: turned, scaled and moved, or
at another speed and with noise. Speakers say the same digits, so they are owners of one industry (set_speaker becomes
set@speaker); a letter of one alphabet is none of another.

Run: python benchmarks/media.py [--quick] [--data DIR] [--work DIR] [--seeds N]. --quick: one seed.
"""

from __future__ import annotations

import io
import json
import sys
import wave
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from _common import bar, finish, parser, table
from _media_bodies import RATE, body
from _outcomes import Outcomes, mean_over_seeds
from _specialists import Bench, asking, contributions, judged, made, mean, scores
from fanbu.catalogue import method
from fanbu.data.media import data_url
from fanbu.domain import Domain, Specialist, load_domain
from fanbu.heads import open_classifier
from fanbu.judge.compare import gain_kept
from fanbu.machine import resolve_machine
from fanbu.model import Model, load_tokenizer, provenance, save_network
from fanbu.progress import bar as progress_bar
from fanbu.progress import log
from fanbu.types import Context

TASKS = {"image": "image-classification", "audio": "audio-classification"}
COPIES = 4  # of each training row, bent anew
TUNE: Mapping[str, Any] = {"epochs": 20, "lr": 5e-4, "patience": 8, "batch_size": 16}
TEACH = {"epochs": 8, "lr": 5e-4}
SMALL: Mapping[str, Any] = {"epochs": 20, "lr": 1e-3, "patience": 8}


def domains_of(kind: str, data: Path, work: Path) -> dict[str, Domain]:
    """The open domains of a kind; their arrays are written as PNG and WAV in data URLs first."""
    found = {}
    for train in sorted(data.glob("*/train.npz")):
        if ("n" in np.load(train, allow_pickle=False)) == (kind == "audio"):
            name = train.parent.name
            files = {s: _written(kind, train.with_name(f"{s}.npz"), work / name) for s in ("train", "valid", "test")}
            name = name.replace("_", "@", 1) if kind == "audio" else name
            found[name] = load_domain(name, task=TASKS[kind], **files)  # type: ignore[arg-type]
    if not found:
        sys.exit(f"no {kind} domains in {data}; give their folder with --data")
    return found


def _written(kind: str, path: Path, folder: Path) -> str:
    out = folder / f"{path.stem}.jsonl"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        z, numbers = np.load(path, allow_pickle=False), np.random.default_rng(0)
        rows = list(z["x"]) if kind == "image" else _sounds(z["x"], z["n"])
        whole = _png if kind == "image" else _wav
        lines = []
        for row, label in zip(rows, z["y"].tolist(), strict=True):
            bent = [(_turned if kind == "image" else _paced)(row, numbers) for _ in range(COPIES)]
            lines += [{kind: whole(x), "label": str(label)} for x in [row, *(bent if path.stem == "train" else [])]]
        out.write_text("\n".join(map(json.dumps, lines)))
    return str(out)


def _png(x: Any) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(x).save(stream, "PNG")
    return data_url(stream.getvalue(), "image/png")


def _turned(x: Any, numbers: np.random.Generator) -> Any:
    from PIL import Image

    angle, scale, moved = numbers.normal(0, 0.15), numbers.uniform(0.85, 1.15), numbers.normal(0, 1.2, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    middle = np.array(x.shape[::-1]) / 2
    shift = middle - turn @ (middle + moved)
    affine = (*turn[0], shift[0], *turn[1], shift[1])
    return np.asarray(
        Image.fromarray(x).transform(x.shape[::-1], Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    )


def _sounds(x: Any, lengths: Any) -> list[Any]:
    """From 8-bit mu-law, concatenated, to numbers in [-1, 1]."""
    v = x / 127.5 - 1
    return np.split(np.sign(v) * (256 ** np.abs(v) - 1) / 255, np.cumsum(lengths)[:-1])


def _paced(x: Any, numbers: np.random.Generator) -> Any:
    at = np.arange(0, len(x) - 1, numbers.uniform(0.85, 1.15))
    loud = numbers.uniform(0.6, 1.0)
    return np.clip(loud * np.interp(at, np.arange(len(x)), x) + numbers.normal(0, 0.003, len(at)), -1, 1)


def _wav(x: Any) -> str:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE)
        sound.writeframes((32767 * x).astype("<i2").tobytes())
    return data_url(stream.getvalue(), "audio/wav")


def opened(kind: str, size: int, out: Path, domains: Mapping[str, Domain], context: Context) -> Model:
    """A body (one for all seeds) with probed label rows."""
    plain = replace(context, seed=0)
    base = made(out.parents[1] / f"{kind}-body-{size}", lambda o: body(kind, size, o, plain))
    probe = method("probe")
    network = open_classifier(base, context, task=TASKS[kind])  # type: ignore[arg-type]
    start = save_network(
        network, load_tokenizer(base), out.with_name(f"{out.name}-opened"), provenance("open", [base], context)
    )
    sent = [probe.contribute(Specialist(start, d), start, context) for d in domains.values()]
    return probe.absorb(start, sent, out, context)


def prepare(kind: str, seed: int, data: Path, work: Path, context: Context) -> Bench:
    """The large network, probed, and its specialists."""
    domains, folder = domains_of(kind, data, work / "data"), work / f"{kind}-{seed}"
    context = replace(context, seed=seed, probe=asking({d.name: d.train.texts for d in domains.values()}))
    large = made(folder / "large", lambda out: opened(kind, 4, out, domains, context))
    return Bench(folder, domains, context, large, _grown(folder / "grown", large, domains, context, TUNE))


def small(kind: str, bench: Bench) -> list[Specialist]:
    """Specialists of half the depth and width."""
    start = made(bench.folder / "small", lambda out: opened(kind, 2, out, bench.domains, bench.context))
    return _grown(bench.folder / "grown-small", start, bench.domains, bench.context, SMALL)


def _grown(
    folder: Path, parent: Model, domains: Mapping[str, Domain], context: Context, tune: Mapping[str, Any]
) -> list[Specialist]:
    way = method("finetune")
    return [
        Specialist(
            made(folder / d.name, lambda out, d=d: way.shrink(parent, d, out, context, train=tune)), d, parent
        )
        for d in domains.values()
    ]  # fmt: skip


def fed_back(bench: Bench, specialists: list[Specialist], name: str) -> tuple[Outcomes, int]:
    """What distilling makes of their panels, and how many bytes crossed."""
    way, sent = method("distill", "feedback"), contributions(bench, specialists, f"panels-{name}")
    model = made(bench.folder / name, lambda out: way.absorb(bench.incumbent, sent, out, bench.context, train=TEACH))
    return judged(bench, name, dict.fromkeys(bench.domains, model)), sum(c.bytes for c in sent)


def multitask(bench: Bench) -> Outcomes:
    """All labelled rows together: the reference."""
    way = method("multitask")
    sent = [way.contribute(s, bench.incumbent, bench.context) for s in bench.specialists]
    model = made(
        bench.folder / "multitask", lambda out: way.absorb(bench.incumbent, sent, out, bench.context, train=TEACH)
    )
    return judged(bench, "multitask", dict.fromkeys(bench.domains, model))


def one_seed(kind: str, bench: Bench) -> tuple[dict[str, Outcomes], int]:
    """Outcomes by name, and the bytes of the full-size specialists' panels."""
    few = small(kind, bench)
    found = {
        "probed base": judged(bench, "probed base", dict.fromkeys(bench.domains, bench.incumbent)),
        "specialists": judged(bench, "specialists", {s.domain.name: s.model for s in bench.specialists}),
        "small specialists": judged(bench, "small specialists", {s.domain.name: s.model for s in few}),
    }
    found["distill"], crossed = fed_back(bench, list(bench.specialists), "distill")
    found["distill from small"], _ = fed_back(bench, few, "distill-from-small")
    found["multitask"] = multitask(bench)
    return found, crossed


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--seeds", type=int, default=None, help="default: 3, with --quick 1")
    flags.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    args = flags.parse_args()
    device, precision, threads = resolve_machine("auto", "auto", 0)
    texts, values, bars = [], {}, []
    for kind in args.only:
        runs, crossed = [], 0
        with progress_bar() as progress:
            for seed in range(args.seeds or (1 if args.quick else 3)):
                log(f"== {kind}, seed {seed}")
                context = Context(device=device, precision=precision, threads=threads, progress=progress)
                found, crossed = one_seed(kind, prepare(kind, seed, args.data, args.work / "media", context))
                runs.append(found)
        found = mean_over_seeds(runs)
        texts.append(table(scores(found)))
        print(texts[-1], flush=True)
        kept = gain_kept(found["distill"], found["probed base"], found["specialists"], "told", 0)
        value = kept["value"] if kept else float("nan")
        got = f"{value:.2f}" if kept else "none: specialists are no better than the probed base"
        bars.append(bar(f"{kind}: gain kept", got, ">= 0.9", value >= 0.9))
        values[kind] = {
            "told": {n: mean(o, "told") for n, o in found.items()}, "gain kept": kept, "crossed": crossed,
            "seeds": len(runs),
        }  # fmt: skip
    return finish("media-quick" if args.quick else "media", "\n\n".join(texts), values, bars)


if __name__ == "__main__":
    sys.exit(main())
