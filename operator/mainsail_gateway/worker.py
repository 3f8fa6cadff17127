"""One of several gateways in a pod: `python -m mainsail_gateway.worker`, started by crew.py."""

import sys

import msgspec
import uvloop
from lightkube.core.exceptions import ConfigError

from mainsail_gateway.crew import Post
from mainsail_gateway.server import log_to_stderr, serve


def main() -> None:
    post = msgspec.json.decode(sys.stdin.buffer.readline(), type=Post)
    log_to_stderr(post.settings.log_level, worker=post.index)
    try:
        uvloop.run(serve(post.settings, post))
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
