"""`mainsail-gateway`: see --help."""

import logging
import sys

import uvloop
from lightkube.core.exceptions import ConfigError

from mainsail_gateway.server import serve
from mainsail_gateway.settings import parse


def main() -> None:
    settings = parse()
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        uvloop.run(serve(settings))
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
