"""`fastsae` of several processes, all but the first of which take long for their checksums.

torchrun slow_checksums.py SECONDS ARGUMENTS
"""

import os
import sys
import time
from typing import Any

from fastsae.cli import main
from fastsae.data.shards import ActivationShards

verify = ActivationShards.verify


def slow(self: ActivationShards, *arguments: Any) -> None:
    if os.environ["RANK"] != "0":
        time.sleep(float(sys.argv[1]))
    verify(self, *arguments)


ActivationShards.verify = slow  # pyright: ignore[reportAttributeAccessIssue]
main(sys.argv[2:])
