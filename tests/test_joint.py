"""Joint modelling: the entities that all have, a network cut between parties, and what each lets out."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fanbu.errors import DataError, FanbuError, IntegrityError, RetryError, UsageError
from fanbu.tables.alignment import blinded, common, points
from fanbu.tables.joint import Here, JointClassifier, align
from fanbu.tables.party import Party
from fanbu.transport.session import Identity, connected, processes, serve

Array = np.ndarray[Any, Any]
QUICK = {"epochs": 30, "patience": 5, "batch_size": 64, "lr": 5e-3}


def tables(rows: int = 600, seed: int = 0) -> tuple[list[str], Array, Array, Array]:
    """Names, the columns of two parties, and labels that need both: whether two signs are the same."""
    random = np.random.default_rng(seed)
    x, z = random.normal(size=(rows, 3)), random.normal(size=(rows, 2))
    y = np.where((x[:, 0] > 0) == (z[:, 0] > 0), "same", "other")
    return [f"client-{seed}-{i}" for i in range(rows)], x, z, y


def bank(seed: int = 0, keep: slice = slice(None)) -> Party:
    """The second party: other names too, in another order."""
    ids, _, z, _ = tables(seed=seed)
    order = np.random.default_rng(7).permutation(len(ids))
    ids, z = [ids[i] for i in order][keep], z[order][keep]
    return Party("bank", [*ids, "nobody else's"], np.vstack([z, np.ones(2)]), width=8, lr=5e-3)


def test_what_all_have_is_found_in_one_order_for_all() -> None:
    names = {"a": ["x", "y", "z", "only a"], "b": ["z", "only b", "x"], "c": ["x", "z", "y"]}
    keys = {n: bytes([i + 1]) * 32 for i, n in enumerate(names)}
    final = {}
    for n, ids in names.items():
        final[n] = points(ids)
        for other in reversed(list(names)) if n == "b" else names:  # the order of blinding does not matter
            final[n] = blinded(final[n], keys[other])
    rows = common(final)
    shared = [[names[n][i] for i in rows[n]] for n in names]
    assert shared[0] == shared[1] == shared[2]
    assert sorted(shared[0]) == ["x", "z"]


def test_names_leave_as_points_that_say_nothing() -> None:
    party = bank()
    first, again = (party.answer("blind", {})["points"] for _ in range(2))
    assert not (first == again).all(1).any()  # a fresh secret each time
    own = {p.tobytes() for p in points(party.ids)}
    assert not own & {p.tobytes() for p in first}
    with pytest.raises(DataError, match="several rows"):
        Party("bank", ["x", "x"], np.ones((2, 1)))


def test_two_parties_learn_what_neither_could_alone(tmp_path: Path) -> None:
    ids, x, _, y = tables()
    own, other = Party("shop", ids, x, width=8, lr=5e-3), bank(keep=slice(0, 550))
    model = JointClassifier(**QUICK).fit(own, y, Here({"bank": other}))
    fresh_ids, fresh_x, _, fresh_y = tables(seed=1)
    own.hold(fresh_ids, fresh_x)
    later = bank(seed=1)
    other.hold(later.ids, later.x)
    right = float((model.predict(own, Here({"bank": other})) == fresh_y).mean())
    alone = Party("shop", ids, x)
    single = JointClassifier(**QUICK).fit(alone, y, Here({}))
    alone.hold(fresh_ids, fresh_x)
    assert right > 0.9
    assert float((single.predict(alone, Here({})) == fresh_y).mean()) < 0.6
    # from disk, each part where it lies
    p = model.predict_proba(own, Here({"bank": other}))
    model.save(tmp_path / "top")
    own.save(tmp_path / "shop")
    other.save(tmp_path / "bank")
    back = Party.load(tmp_path / "shop", fresh_ids, fresh_x)
    there = Party.load(tmp_path / "bank", later.ids, later.x)
    np.testing.assert_array_equal(JointClassifier.load(tmp_path / "top").predict_proba(back, Here({"bank": there})), p)
    with pytest.raises(IntegrityError, match="no party part of these columns"):
        Party.load(tmp_path / "bank", later.ids, later.x[:, :1])
    # an entity that one of them does not know
    own.hold([*fresh_ids, "stranger"], np.vstack([fresh_x, fresh_x[:1]]))
    with pytest.raises(DataError, match="1 of 601 entities are not known to all"):
        model.predict(own, Here({"bank": other}))
    assert len(align(own, Here({"bank": other}))) == 600


def test_processes_and_seeds_change_no_bit() -> None:
    ids, x, _, y = tables(200)
    found = []
    for seed in (0, 0, 1):
        own, other = Party("shop", ids, x), bank()
        model = JointClassifier(epochs=3, seed=seed).fit(own, y, Here({"bank": other}))
        found.append(model.predict_proba(own, Here({"bank": other})))
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    with processes({"bank": (bank, ())}) as apart:
        own = Party("shop", ids, x)
        model = JointClassifier(epochs=3).fit(own, y, apart)
        np.testing.assert_array_equal(model.predict_proba(own, apart), found[0])
        with pytest.raises(DataError, match="what no party does"):
            apart.ask("bank", "show me", {})
        apart._running[0].kill()
        with pytest.raises(RetryError, match="does not answer"):
            model.predict(own, apart)


def test_labels_told_by_chance_are_those_of_their_epsilon() -> None:
    ids, x, _, y = tables(4000)
    codes = np.unique(y, return_inverse=True)[1]
    import torch

    model = JointClassifier(label_epsilon=1.0)
    model.classes_ = np.unique(y)
    told, response = model._told(torch.from_numpy(codes), torch.Generator())
    kept = np.e / (np.e + 1)
    assert float(response[0, 0]) == pytest.approx(kept)
    assert float(response[0, 0] / response[1, 0]) == pytest.approx(np.e)
    assert float((told.numpy() == codes).mean()) == pytest.approx(kept, abs=0.03)
    assert not torch.equal(told, model._told(torch.from_numpy(codes), torch.Generator())[0])
    ids, x, _, y = tables()
    own, other = Party("shop", ids, x, width=8, lr=5e-3), bank()
    noisy = JointClassifier(**QUICK, label_epsilon=2.0).fit(own, y, Here({"bank": other}))
    assert float((noisy.predict(own, Here({"bank": other})) == y).mean()) > 0.8


class Twisting:
    """A party who does not say what it should."""

    def __init__(self, party: Party, what: str, said: dict[str, Array]) -> None:
        self.party, self.what, self.said = party, what, said
        self.names = [party.name]

    def ask(self, name: str, what: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return self.said if what == self.what else self.party.answer(what, arrays)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("embed", {}),
        ("forward", {"e": np.full((64, 8), np.nan, np.float32)}),
        ("forward", {"e": np.zeros((3, 8), np.float32)}),
        ("blind", {"points": np.zeros((5, 31), np.uint8)}),
        ("blind", {"points": np.zeros((5, 32), np.float32)}),
    ],
)
def test_what_no_party_says_is_refused(what: str, said: dict[str, Array]) -> None:
    ids, x, _, y = tables(200)
    with pytest.raises(FanbuError):
        JointClassifier(**QUICK).fit(Party("shop", ids, x), y, Twisting(bank(), what, said))


@pytest.mark.parametrize(
    ("what", "arrays"),
    [
        ("order", {"rows": np.array([0, 0])}),
        ("order", {"rows": np.array([10**6])}),
        ("forward", {"rows": np.array([-1])}),
        ("forward", {"rows": np.array([599])}),
        ("backward", {"g": np.zeros((1, 8), np.float32)}),
        ("embed", {}),
        ("shutdown", {}),
    ],
)
def test_a_party_answers_nothing_else(what: str, arrays: dict[str, Array]) -> None:
    party = bank()
    party.answer("order", {"rows": np.arange(100)})
    party.answer("begin", {"train": np.arange(90)})
    with pytest.raises(DataError, match="session"):
        party.answer(what, arrays)


def test_tables_that_cannot_be_used_are_named() -> None:
    ids, x, _, y = tables(100)
    with pytest.raises(DataError, match="finite numbers"):
        Party("shop", ids, np.where(x > 1, np.nan, x))
    with pytest.raises(DataError, match="100 names"):
        Party("shop", ids, x[:50])
    with pytest.raises(UsageError, match="width and hidden"):
        Party("shop", ids, x, width=0)
    with pytest.raises(UsageError, match="label_epsilon"):
        JointClassifier(label_epsilon=-1)
    with pytest.raises(DataError, match="not one label a row"):
        JointClassifier().fit(Party("shop", ids, x), y[:50], Here({}))
    strangers = Party("bank", [f"other {i}" for i in range(50)], np.ones((50, 2)))
    with pytest.raises(DataError, match="too little that all parties have"):
        JointClassifier().fit(Party("shop", ids, x), y, Here({"bank": strangers}))
    with pytest.raises(UsageError, match="two parties have one name"):
        JointClassifier().fit(Party("bank", ids, x), y, Here({"bank": bank()}))


def certificates(folder: Path) -> None:
    """A CA, and a certificate of it for each of two parties; and a stranger's."""
    new = "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    lines = [f"{new} -x509 -days 2 -subj /CN={name} -keyout {name}.key -out {name}.pem" for name in ("ca", "x")]
    (folder / "san.txt").write_text("subjectAltName=IP:127.0.0.1")
    by_ca = "-CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile san.txt"
    for name in ("bank", "shop"):
        lines.append(f"{new} -subj /CN={name} -keyout {name}.key -out {name}.csr")
        lines.append(f"openssl x509 -req -in {name}.csr {by_ca} -out {name}.pem")
    for line in lines:
        subprocess.run(line.split(), cwd=folder, check=True, capture_output=True)


def test_parties_on_the_network_show_who_they_are(tmp_path: Path) -> None:
    certificates(tmp_path)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    who = {
        n: Identity(tmp_path / f"{n}.pem", tmp_path / f"{n}.key", tmp_path / "ca.pem") for n in ("bank", "shop", "x")
    }
    there = bank()
    threading.Thread(target=serve, args=(there, "127.0.0.1", port, who["bank"]), daemon=True).start()
    address = {"bank": ("127.0.0.1", port)}
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()  # a stranger who hangs up stops nothing
            break
    for stranger in (who["x"], Identity(tmp_path / "shop.pem", tmp_path / "shop.key", tmp_path / "x.pem")):
        with pytest.raises(RetryError, match=r"cannot be reached|does not answer"):
            connected(address, stranger).ask("bank", "blind", {})
    ids, x, _, y = tables(200)
    own, here = Party("shop", ids, x), bank()
    with connected(address, who["shop"]) as others:
        model = JointClassifier(epochs=2).fit(own, y, others)
        p = model.predict_proba(own, others)
        with pytest.raises(DataError, match="what no party does"):
            others.ask("bank", "show me", {})
    again = Party("shop", ids, x)
    same = JointClassifier(epochs=2).fit(again, y, Here({"bank": here}))
    np.testing.assert_array_equal(same.predict_proba(again, Here({"bank": here})), p)
    with pytest.raises(RetryError, match="cannot be reached"):
        connected({"bank": ("127.0.0.1", port + 1 if port < 65535 else port - 1)}, who["shop"])
