"""Panels: what a specialist says on the probe set, in few bytes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fanbu.batches import evenly
from fanbu.contribution import Contribution
from fanbu.data.augment import augmented
from fanbu.domain import Domain, Specialist
from fanbu.errors import FitError, IntegrityError
from fanbu.feedback.predictions._across import characters, cut, projection, tokens_across
from fanbu.feedback.predictions._relevance import near
from fanbu.feedback.predictions._trust import fit_temperature, fit_trust
from fanbu.heads import check_labels_known, domains_of, final_layer
from fanbu.merging.tokens import rows_of
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.predict import class_logits, features, token_losses, top_tokens
from fanbu.types import Context, digest, industry_of

SILENT = "silent"
_SURE = 255  # what probability 1 is written as
_ROWS = 2000  # training rows that texts are held against, at most


def asked(context: Context, domain: str) -> list[int]:
    """Numbers of the probe rows that a specialist is asked about: its own industry's, and those of nobody's."""
    industry = industry_of(domain)
    return [i for i, r in enumerate(context.probe.rows) if r.domain is None or industry_of(r.domain) == industry]


def check_probe(name: str, contributions: Sequence[Contribution], context: Context) -> None:
    """Raises FitError where there is no probe set, or a panel was made on another one."""
    if not context.probe.rows:
        raise FitError("no-probe-set", f"{name} needs a probe set", remedy="name one in the recipe under `probe`")
    for c in contributions:
        if c.meta["probe"] != context.probe.digest:
            raise FitError(
                "other-probe-set", f"the panel of {c.domain} was made on another probe set",
                allowed=context.probe.digest[:12], got=str(c.meta["probe"])[:12], remedy="ask its owner again",
            )  # fmt: skip


def variants(context: Context, domain: str, times: int) -> list[str]:
    """So many variants of each probe text of a domain (``data.augment``): owner and centre make the same ones."""
    own = [row.text for row in context.probe.rows if row.domain == domain]
    return augmented(own, times, context.seeded("variants", domain))


def made_for(context: Context, domain: str, times: int) -> int:
    """How many ``variants`` there are."""
    return times * sum(row.domain == domain for row in context.probe.rows)


def rows_known(base: Model, domain: str) -> tuple[list[int], str]:
    """The base's label rows for a domain's industry, and a mark of their names: both sides have them, so that none
    crosses."""
    rows = domains_of(base.labels).get(industry_of(domain), [])
    return rows, digest([base.labels[i] for i in rows])[:12]


def columns_of(c: Contribution, base: Model) -> list[int]:
    """The base's label rows that a panel is about. Raises FitError where it was made for other rows, or names strange
    ones."""
    rows, mark = rows_known(base, c.domain)
    known = c.meta["known"] or list(range(len(rows)))
    if c.meta["head"] != mark or not all(isinstance(i, int) and 0 <= i < len(rows) for i in known):
        raise FitError(
            "other-labels", f"the panel of {c.domain} was made for other label rows than {base.path} has", allowed=mark,
            got=c.meta["head"], remedy="ask its owner again, with this base",
        )  # fmt: skip
    return [rows[i] for i in known]


def class_panel(
    specialist: Specialist, base: Model, context: Context, top_k: int, mass: float, augment: int = 0,
    *, alone: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    """Soft labels on the probe rows: the specialist's and the base's, mixed by what validation rows say of either.

    p = w softmax(z_specialist / T_s) + (1 - w) softmax(z_base / T_b). Each T minimises the negative log-likelihood of
    the validation rows (Guo et al. 2017), then w that of the mixture (``_trust``): one for all texts, the ``trust`` in
    the specialist, and from there one for each text, by how sure either is and whether they agree. A specialist that
    learned nothing new gets none; one that is no better, but errs elsewhere, gets its share. Of nobody's texts that
    are not ``near`` its own nothing is said. ``alone``: what the specialist says by itself is sent, whatever its trust
    and however far.

    tensors: ``labels`` and ``probs`` (``said``), for the rows that are ``asked`` and then ``variants``; and where there
    are rows of which nothing is said, ``silent``, a bit for each row. meta: which of the industry's label rows in the
    base these are about (``known``; empty: all, in their order), both temperatures, ``trust``, what it goes by
    (constant, own odds, base's odds, agreement), and wins and losses against the base on validation rows.
    """
    domain = specialist.domain
    target = torch.tensor(domain.valid.labels)
    rows = [context.probe.rows[i] for i in asked(context, domain.name)]
    made = variants(context, domain.name, augment)
    texts, homely = [r.text for r in rows] + made, [r.domain is not None for r in rows] + [True] * len(made)
    z_own = class_logits(*_opened(specialist.model, domain), [*domain.valid.texts, *texts], context)
    network, tokenizer = _opened(base, domain)
    known_texts = [] if alone or all(homely) else evenly(domain.train.texts, _ROWS)
    parts = known_texts, domain.valid.texts, texts
    x = [features(network, tokenizer, part, context) for part in parts]
    z_base = final_layer(network).cpu()(torch.cat(x[1:])).detach()
    valid, probs, temperatures = [], [], []
    for model, z in ((specialist.model, z_own), (base, z_base)):
        z = z[:, [model.labels.index(label) for label in domain.full_labels]]
        temperatures.append(fit_temperature(z[: len(target)], target))
        p = (z / temperatures[-1]).softmax(1)
        valid.append(p[: len(target)])
        probs.append(p[len(target) :])
    trust, most = fit_trust(valid[0], valid[1], target), min(top_k, len(domain.full_labels))
    group, mark = rows_known(base, domain.name)
    known = [group.index(base.labels.index(label)) for label in domain.full_labels]
    close = near(*x) | torch.tensor(homely, dtype=torch.bool)
    w = (torch.ones(len(texts)) if alone else trust.of(*probs))[:, None]
    mixed = w * probs[0] + (1 - w) * probs[1]
    quiet = {} if bool(close.all()) else {SILENT: packed(~close)}
    right, base_right = (p.argmax(1) == target for p in valid)
    meta = {
        "probe": context.probe.digest, "head": mark, "trust": trust.share if bool(close.any()) else 0.0,
        "known": [] if known == list(range(len(group))) else known,
        "trust_by": trust.coefficients,
        "temperature": temperatures[0], "base_temperature": temperatures[1], "valid": len(target),
        "wins": int((right & ~base_right).sum()), "losses": int((~right & base_right).sum()),
        "most": most, "mass": mass,
    }  # fmt: skip
    return {**said(mixed[close], most, mass), **quiet}, meta


def _opened(model: Model, domain: Domain) -> tuple[Any, Any]:
    check_labels_known(model, domain.full_labels)
    return load_network(model), load_tokenizer(model)


def said(probs_nl: Tensor, most: int, mass: float) -> dict[str, Tensor]:
    """Probabilities in about two bytes a text: the likeliest labels and q = round(255 p), one text after the other.

    A text's list, likeliest label first, ends where its q come to 255 ``mass``, else after ``most`` labels; so no
    lengths are kept. What is left of its mass is not said.

    tensors: ``labels`` and ``probs``, in the smallest integers that hold them, and these as bytes that zlib made fewer.
    """
    p, order = probs_nl.sort(dim=1, descending=True, stable=True)
    q = (_SURE * p[:, :most]).round()
    before = q.cumsum(1) - q
    keep = before < _SURE * mass
    keep[:, 0] = True
    labels = order[:, :most][keep].to(_wide(probs_nl.shape[1]))
    return {"labels": _deflated(labels), "probs": _deflated(q[keep].to(torch.uint8))}


def _wide(count: int) -> torch.dtype:
    return torch.uint8 if count <= 256 else torch.int32


def _deflated(values: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(values.numpy().tobytes(), 9)), dtype=torch.uint8)


def _inflated(packed: Tensor, dtype: torch.dtype, most: int) -> Tensor:
    """The integers again. ValueError where these are no such bytes, or more than ``most`` integers."""
    size = torch.empty(0, dtype=dtype).element_size()
    reader = zlib.decompressobj()
    try:
        found = reader.decompress(packed.numpy().tobytes(), most * size + 1) if packed.dtype == torch.uint8 else b""
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not reader.eof or len(found) % size or len(found) > most * size:
        raise ValueError("other bytes than were to be read")
    return torch.frombuffer(bytearray(found), dtype=dtype) if found else torch.zeros(0, dtype=dtype)


def heard(c: Contribution, rows: int, count: int) -> Tensor:
    """``said`` again as [rows, count of labels], summing to 1: mass that was not said is spread evenly over the others.

    Raises IntegrityError where the lists do not come to so many rows, or name no label or one twice.
    """
    meta: Mapping[str, Any] = c.meta
    most, enough = int(meta["most"]), _SURE * float(meta["mass"])
    dtypes = {"labels": _wide(count), "probs": torch.uint8}
    try:
        labels, q = (_inflated(c.tensors[n], dtype, rows * most).tolist() for n, dtype in dtypes.items())
    except ValueError:
        labels, q = [], []
    lengths, length, total, spoken = [], 0, 0, True
    for value in q:
        length, total = length + 1, total + value
        if total >= enough or length == most:
            lengths.append(length)
            spoken &= total > 0
            length, total = 0, 0
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    sound = (
        spoken and len(lengths) == rows and not length and len(labels) == len(q) and all(0 <= i < count for i in labels)
    )
    if not sound or len(set(zip(row.tolist(), labels, strict=True))) < len(labels):
        raise IntegrityError(
            "contribution-broken", f"the panel of {c.domain} does not answer the rows that it was asked about",
            allowed=f"{rows} lists of different labels below {count}", got=f"{len(lengths)} lists",
            remedy="ask its owner to send it again",
        )  # fmt: skip
    p = torch.zeros(rows, count)
    p[row, torch.tensor(labels, dtype=torch.long)] = torch.tensor(q, dtype=torch.float32) / _SURE
    silent = torch.ones(rows, count, dtype=torch.bool)
    silent[row, torch.tensor(labels, dtype=torch.long)] = False
    left = (1 - p.sum(1)).clamp_min(0) / silent.sum(1).clamp_min(1)
    p += left[:, None] * silent
    return p / p.sum(1, keepdim=True)


class Answers(NamedTuple):
    """``probs_nk`` [rows that were asked about and then variants, labels], zeros where nothing is said: numbers of the
    probe rows, and of the label rows in the base that these labels have."""

    rows: list[int]
    columns: list[int]
    probs_nk: Tensor


def answered(c: Contribution, base: Model, context: Context, augment: int = 0) -> Answers:
    """A whole panel (``heard``), and what it is about."""
    rows, columns = asked(context, c.domain), columns_of(c, base)
    count = len(rows) + made_for(context, c.domain, augment)
    speaking = ~unpacked(c, count)
    nobody = torch.tensor([context.probe.rows[i].domain is None for i in rows] + [False] * (count - len(rows)))
    if not bool((speaking | nobody).all()):
        raise IntegrityError(
            "contribution-broken", f"the panel of {c.domain} says nothing of its own industry's texts",
            allowed="silence on nobody's texts", got=f"{int((~speaking & ~nobody).sum())} others",
            remedy="ask its owner to send it again",
        )  # fmt: skip
    p = torch.zeros(count, len(columns))
    p[speaking] = heard(c, int(speaking.sum()), len(columns))
    return Answers(rows, columns, p)


def packed(bits_n: Tensor) -> Tensor:
    """Eight bits a byte."""
    return torch.from_numpy(np.packbits(bits_n.numpy()))


def unpacked(c: Contribution, rows: int) -> Tensor:
    """Which of so many rows a panel is silent about. Raises IntegrityError where its bits are of other rows."""
    bits = c.tensors.get(SILENT)
    if bits is None:
        return torch.zeros(rows, dtype=torch.bool)
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (-(-rows // 8),):
        raise IntegrityError(
            "contribution-broken", f"the panel of {c.domain} does not say of which rows it is silent",
            allowed=f"{-(-rows // 8)} bytes", got=f"{tuple(bits.shape)} of {bits.dtype}",
            remedy="ask its owner to send it again",
        )  # fmt: skip
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=rows)).bool()


def token_panel(
    specialist: Specialist, base: Model, context: Context, top_k: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The k likeliest next tokens at each place of the probe rows, and validation losses of both models.

    All in the base's tokens: a specialist that cuts texts otherwise is asked where both end a token (``_across``), and
    says nothing elsewhere. Losses are in nats a token; across vocabularies, a character.

    tensors, for the rows that are ``asked``, in their order: ``lengths`` [asked], ``indices`` and ``probs``
    [sum of lengths, k].
    """
    domain = specialist.domain
    network, tokenizer = load_network(specialist.model), load_tokenizer(specialist.model)
    there, other = load_network(base), load_tokenizer(base)
    texts = [context.probe.rows[i].text for i in asked(context, domain.name)]
    own = token_losses(network, tokenizer, domain.valid.texts, context)
    before = token_losses(there, other, domain.valid.texts, context)
    if tokenizer.get_vocab() == other.get_vocab():
        answers = top_tokens(network, tokenizer, texts, context, top_k)
    else:
        first = projection(specialist.model, base)  # says so where a tokenizer has no offsets
        own[:, 1] = characters(cut(network, tokenizer, domain.valid.texts, context))
        before[:, 1] = characters(cut(there, other, domain.valid.texts, context))
        theirs = cut(there, other, texts, context)
        answers = tokens_across(network, tokenizer, theirs, first, rows_of(base), texts, context, top_k)
    losses = [loss[:, 0] / loss[:, 1].clamp_min(1) for loss in (own, before)]
    loss, base_loss = (float(sums[:, 0].sum() / sums[:, 1].sum()) for sums in (own, before))
    meta = {
        "probe": context.probe.digest, "valid": len(own), "wins": int((losses[0] < losses[1]).sum()),
        "losses": int((losses[0] > losses[1]).sum()), "trust": float(loss < base_loss), "loss": loss,
        "base_loss": base_loss,
    }  # fmt: skip
    tensors = {
        "lengths": torch.tensor([len(i) for i, _ in answers], dtype=torch.int32),
        "indices": torch.cat([i for i, _ in answers]) if answers else torch.zeros(0, 1, dtype=torch.int32),
        "probs": torch.cat([p for _, p in answers]) if answers else torch.zeros(0, 1).half(),
    }
    return tensors, meta


def heard_tokens(c: Contribution, lengths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Indices and probabilities [length, k] of each row that was asked about. Raises IntegrityError where a panel has
    other lengths."""
    indices, probs = c.tensors["indices"], c.tensors["probs"]
    if c.tensors["lengths"].tolist() != list(lengths) or not len(indices) == len(probs) == sum(lengths):
        raise IntegrityError(
            "contribution-broken", f"the panel of {c.domain} does not answer the tokens that it was asked about",
            allowed=f"{sum(lengths)} tokens of {len(lengths)} rows", got=f"{len(indices)}, {len(c.tensors['lengths'])}",
            remedy="ask its owner to send it again",
        )  # fmt: skip
    return list(zip(indices.split(list(lengths)), probs.split(list(lengths)), strict=True))
