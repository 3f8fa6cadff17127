from pathlib import Path

import pytest
from e2e.cluster.cache import entry, key_of


def test_key_depends_on_where_parts_end():
    assert key_of("ab", "c") != key_of("a", "bc")
    assert key_of("ab", b"c") == key_of(b"ab", "c")


def test_made_once(tmp_path: Path):
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text("whole")

    first, second = entry(tmp_path, "thing", make), entry(tmp_path, "thing", make)
    assert first == second == tmp_path / "thing"
    assert (first / "file").read_text() == "whole"
    assert len(made) == 1


def test_a_failure_leaves_no_half_entry(tmp_path: Path):
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        entry(tmp_path, "thing", fail)
    assert not (tmp_path / "thing").exists()
    assert list((tmp_path / "drafts").iterdir()) == []
