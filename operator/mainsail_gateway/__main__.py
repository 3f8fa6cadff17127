"""`mainsail-gateway`: see --help."""

import sys

import uvloop
from lightkube.core.exceptions import ConfigError

from mainsail_gateway.crew import lead
from mainsail_gateway.server import log_to_stderr, serve
from mainsail_gateway.settings import parse


def main() -> None:
    settings = parse()
    log_to_stderr(settings.log_level)
    try:
        if settings.workers > 1:
            sys.exit(uvloop.run(lead(settings)))
        uvloop.run(serve(settings))
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
