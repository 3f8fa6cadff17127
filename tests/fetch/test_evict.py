"""What makes room for another model: never what is in use, the least recently used first, no more than is needed."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mainsail_fetch.cli import main
from mainsail_fetch.evict import SKEW_S, Copy, Rules, make_room, victims
from mainsail_fetch.place import MARGIN, Place

NOW = 1_800_000_000.0
OLD, OLDER, FRESH = Copy("old", 30, NOW - 5000), Copy("older", 20, NOW - 9000), Copy("fresh", 40, NOW - 10)
ROOMY = 10**12


def chosen(rules: Rules, *, total: int = 50, missing: int = 50, free: int = ROOMY) -> list[str]:
    return [copy.name for copy in victims([OLD, OLDER, FRESH], rules, total=total, missing=missing, free=free)]


@pytest.mark.parametrize(
    ("rules", "free", "expected"),
    [
        (Rules(decided_at=NOW), ROOMY, []),
        (Rules(decided_at=NOW, limit=140), ROOMY, []),
        (Rules(decided_at=NOW, limit=130), ROOMY, ["older"]),
        (Rules(decided_at=NOW, limit=110), ROOMY, ["older", "old"]),
        (Rules(decided_at=NOW, limit=50), ROOMY, ["older", "old"]),
        (Rules({"older"}, NOW, limit=130), ROOMY, ["old"]),
        (Rules({"older", "old"}, NOW, limit=50), ROOMY, []),
        (Rules(decided_at=NOW - 8000, limit=50), ROOMY, ["older"]),
        (Rules(decided_at=NOW), MARGIN + 49, ["older"]),
        (Rules(decided_at=NOW), MARGIN + 20, ["older", "old"]),
    ],
    ids=["room", "within", "a little over", "more", "fresh ones stay", "in use", "all in use", "asked since", "disk",
         "fuller disk"],
)  # fmt: skip
def test_who_goes(rules: Rules, free: int, expected: list[str]) -> None:
    assert chosen(rules, free=free) == expected


def test_what_is_there_of_the_new_one_counts_against_the_limit_and_not_for_the_disk() -> None:
    assert chosen(Rules(decided_at=NOW, limit=130), missing=0) == ["older"]
    assert chosen(Rules(decided_at=NOW), missing=0, free=MARGIN) == []


COPIES = st.lists(st.builds(Copy, st.text("abc", min_size=1, max_size=3), st.integers(0, 100), st.floats(0, 1e5)),
                  max_size=8, unique_by=lambda copy: copy.name)  # fmt: skip
RULES = st.builds(Rules, st.frozensets(st.text("abc", min_size=1, max_size=3)), st.floats(0, 1e5),
                  st.none() | st.integers(0, 400))  # fmt: skip


@given(COPIES, RULES, st.integers(0, 100), st.integers(0, MARGIN + 200))
def test_in_every_case(copies: list[Copy], rules: Rules, total: int, free: int) -> None:
    found = victims(copies, rules, total=total, missing=total, free=free)
    allowed = [copy for copy in copies if copy.name not in rules.keep and copy.used < rules.decided_at - SKEW_S]
    assert all(copy in allowed for copy in found)
    assert found == sorted(allowed, key=lambda copy: (copy.used, copy.name))[: len(found)]

    def fits(gone: list[Copy]) -> bool:
        freed = sum(copy.size for copy in gone)
        kept = sum(copy.size for copy in copies) - freed
        return free + freed >= total + MARGIN and (rules.limit is None or kept + total <= rules.limit)

    assert fits(found) or len(found) == len(allowed)
    assert not found or not fits(found[:-1]), "one fewer would have done"


def copy(root: Path, name: str, used: float, size: int = 1 << 20) -> None:
    place = Place(root / name)
    with place.locked():
        place.partial.mkdir()
        (place.partial / "weights").write_bytes(os.urandom(size))
        place.finish()
    os.utime(root / f".{name}.lock", (used, used))


def test_on_a_disk(tmp_path: Path) -> None:
    for name, used in (("a", 100.0), ("b", 200.0), ("busy", 50.0), ("kept", 10.0)):
        copy(tmp_path, name, used)
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "c.partial" / "weights").write_bytes(os.urandom(1 << 20))
    (tmp_path / ".c.lock").touch()
    os.utime(tmp_path / ".c.lock", (20.0, 20.0))
    (tmp_path / "not-ours").mkdir()
    (tmp_path / ".gone.evicted").mkdir()
    rules = Rules({"kept"}, NOW, limit=5 << 20)
    busy = os.open(tmp_path / ".busy.lock", os.O_RDWR)
    fcntl.flock(busy, fcntl.LOCK_EX)
    try:
        gone = make_room(Place(tmp_path / "new"), 3 << 20, rules)
    finally:
        os.close(busy)
    assert gone == ["c", "a"], "c was abandoned, busy is being written, kept is in use, b need not go"
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left == {"b", "busy", "kept", "not-ours"}
    assert not list(tmp_path.glob("*.evicted"))


def test_asking_for_a_copy_is_using_it(tmp_path: Path) -> None:
    copy(tmp_path, "a", 100.0)
    with Place(tmp_path / "a").locked():
        pass
    assert (tmp_path / ".a.lock").stat().st_mtime > 1e9


@pytest.mark.parametrize("flags", [["--limit", "5"], ["--keep", "other"]])
def test_what_would_decide_nothing_is_refused(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["hf://org/name", str(tmp_path / "copy"), *flags])
    assert "--decided-at" in capsys.readouterr().err
