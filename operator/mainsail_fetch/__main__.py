"""`python -m mainsail_fetch`"""

import sys

from mainsail_fetch.cli import main

sys.exit(main())
