"""`mainsail-fetch URI FOLDER`: one model into one folder, once.

Ends with 0 when the folder is complete (at once, when it was before). A failure's reason and words go to the pod's
termination message, where the operator reads them. With --stay it goes on running when it is done, for a DaemonSet.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mainsail_fetch.errors import FetchError
from mainsail_fetch.evict import Rules, make_room
from mainsail_fetch.place import Place, of_disk, told
from mainsail_fetch.progress import Progress
from mainsail_fetch.remote import Remote
from mainsail_fetch.source import HubSource, S3Source, Source, parse

log = logging.getLogger("mainsail_fetch")

DEFAULT_TERMINATION_LOG = "/dev/termination-log"
PARALLEL = 4


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mainsail-fetch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "uri", help="hf://ORGANIZATION/NAME[/FILE], s3://BUCKET/PREFIX or oci://REGISTRY/REPOSITORY[:TAG]"
    )
    parser.add_argument("folder", type=Path, help="where the model's files are to lie; made when it is complete")
    parser.add_argument(
        "--revision", default="main", help="branch, tag or commit of a repository on the Hub (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=0, help="serve /metrics with the progress on this port (default: on none)"
    )
    parser.add_argument(
        "--limit",
        type=int,
        help="bytes that this copy and those beside it may take together (default: what the disk holds)",
    )
    parser.add_argument(
        "--keep", action="append", default=[], metavar="NAME", help="a copy beside it that is in use; repeat for more"
    )
    parser.add_argument("--decided-at", type=float, help="Unix seconds at which --keep was the whole truth; without it "
                        "no copy is deleted to make room")  # fmt: skip
    parser.add_argument("--stay", action="store_true", help="go on running when the model is there (default: end)")
    return parser


def remote_of(source: Source) -> Remote:
    """Imports the client that is needed, and no other."""
    if isinstance(source, HubSource):
        from mainsail_fetch.hub import Hub

        return Hub(source)
    if isinstance(source, S3Source):
        from mainsail_fetch.s3 import Bucket

        return Bucket(source)
    from mainsail_fetch.oci import Registry

    return Registry(source)


def fetch(uri: str, revision: str, place: Place, progress: Progress, rules: Rules | None = None) -> None:
    """rules: which other copies may be deleted to make room; None: none. Raises FetchError."""
    source = parse(uri, revision)
    if source is None:
        raise FetchError("InvalidSource", f"{uri!r} is none of hf://, s3:// and oci://")
    with place.locked():
        if not place.complete:
            try:
                _fill(remote_of(source), place, progress, rules)
            except OSError as error:
                raise of_disk(error, place.folder.parent) from error
    progress.done = True


def _fill(remote: Remote, place: Place, progress: Progress, rules: Rules | None) -> None:
    began, before = time.monotonic(), place.size()
    files = remote.files()
    progress.total = sum(file.size for file in files)
    if rules is not None:
        make_room(place, progress.total, rules)
    place.check_room(progress.total)
    log.info("%d files, %s", len(files), told(progress.total))
    with ThreadPoolExecutor(PARALLEL) as pool:
        for done in [pool.submit(remote.fetch, file, place.partial) for file in files]:
            done.result()
    seconds = time.monotonic() - began
    log.info("complete after %.1f s, %s/s", seconds, told((place.size() - before) / max(seconds, 0.001)))
    place.finish()


def main(arguments: Sequence[str] | None = None) -> int:
    flags = _parsed(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    place = Place(flags.folder)
    progress = Progress(place)
    if flags.port:
        progress.serve(flags.port)
    try:
        fetch(flags.uri, flags.revision, place, progress, _rules(flags))
    except FetchError as error:
        _tell(error)
        return 1
    if flags.stay:
        ended = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: ended.set())
        ended.wait()
    return 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    flags = parser.parse_args(arguments)
    if flags.decided_at is None and (flags.limit is not None or flags.keep):
        parser.error("--limit and --keep decide which copies may be deleted: they need --decided-at")
    return flags


def _rules(flags: argparse.Namespace) -> Rules | None:
    return None if flags.decided_at is None else Rules(frozenset(flags.keep), flags.decided_at, flags.limit)


def _tell(error: FetchError) -> None:
    print(f"error: {error.reason}: {error.message}", file=sys.stderr)
    text = json.dumps({"reason": error.reason, "message": error.message})
    with contextlib.suppress(OSError):  # not in a pod
        Path(os.environ.get("MAINSAIL_TERMINATION_LOG", DEFAULT_TERMINATION_LOG)).write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
