"""One writer, nothing half there, and what the disk has to say."""

from __future__ import annotations

import errno
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from mainsail_fetch.cli import fetch
from mainsail_fetch.errors import FetchError
from mainsail_fetch.place import Place, of_disk, told
from mainsail_fetch.progress import Progress
from mainsail_fetch.remote import RemoteFile


class Remote:
    """Two files; the second one may fail."""

    def __init__(self, error: Exception | None = None, *, size: int = 10) -> None:
        self.error = error
        self.size = size
        self.fetched: list[str] = []

    def files(self) -> list[RemoteFile]:
        return [RemoteFile("a", self.size), RemoteFile("b", self.size)]

    def fetch(self, file: RemoteFile, folder: Path) -> None:
        if (folder / file.path).exists():
            return
        if file.path == "b" and self.error:
            raise self.error
        self.fetched.append(file.path)
        (folder / file.path).write_bytes(b"x" * file.size)


@pytest.fixture
def using(monkeypatch):
    def use(remote: Remote) -> None:
        monkeypatch.setattr("mainsail_fetch.cli.remote_of", lambda source: remote)

    return use


def run(folder: Path) -> Progress:
    progress = Progress(Place(folder))
    fetch("hf://o/n", "main", progress.place, progress)
    return progress


def test_a_failed_try_leaves_nothing_complete_and_the_next_one_goes_on(using, tmp_path: Path) -> None:
    using(Remote(FetchError("SourceUnreachable", "gone")))
    with pytest.raises(FetchError, match="gone"):
        run(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    second = Remote()
    using(second)
    assert run(tmp_path / "m").done
    assert second.fetched == ["b"]
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"a", "b"}


def test_two_at_once_fetch_once(using, tmp_path: Path) -> None:
    remote = Remote()
    using(remote)
    threads = [threading.Thread(target=run, args=(tmp_path / "m",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(remote.fetched) == ["a", "b"]


def test_too_little_disk_is_said_before_anything_is_fetched(using, tmp_path: Path) -> None:
    remote = Remote(size=10**15)
    using(remote)
    with pytest.raises(FetchError, match=r"needs 2000\.00 TB more, and .* free") as caught:
        run(tmp_path / "m")
    assert caught.value.reason == "DiskFull"
    assert remote.fetched == []


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "DiskFull"), (errno.EDQUOT, "DiskFull"), (errno.EROFS, "CacheNotWritable"),
     (errno.EACCES, "CacheNotWritable"), (errno.EIO, "CacheNotWritable")],
)  # fmt: skip
def test_what_the_disk_says(using, tmp_path: Path, number: int, reason: str) -> None:
    using(Remote(OSError(number, "said the disk", "/models/x")))
    with pytest.raises(FetchError) as caught:
        run(tmp_path / "m")
    assert caught.value.reason == reason
    assert of_disk(OSError(number, "said the disk"), tmp_path).reason == reason


def test_progress_over_http(tmp_path: Path) -> None:
    place = Place(tmp_path / "m")
    place.partial.mkdir()
    (place.partial / "a").write_bytes(b"x" * 4096)
    progress = Progress(place, total=8192)
    port = progress.serve(0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as page:
            lines = page.read().decode().splitlines()
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=60)
        progress.done = True
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=60) as page:
            assert page.status == 200
    finally:
        progress.close()
    assert "mainsail:fetch_bytes 4096" in lines
    assert "mainsail:fetch_total_bytes 8192" in lines
    assert "mainsail:fetch_complete 0" in lines


def test_bytes_for_people() -> None:
    assert [told(n) for n in (12, 1500, 2.5e6, 3.2e9, 4.1e12)] == ["12 B", "1.5 kB", "2.5 MB", "3.2 GB", "4.10 TB"]
