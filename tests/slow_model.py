"""`fastsae`, where a language model and a disk are slower than the time-out: `SECONDS` each."""

import time
from typing import Any

from fastsae.cli import main
from fastsae.training import language_model_run, model_ranks
from fastsae.training.row_sources import StreamSource
from fastsae.training.trainer import Trainer

SECONDS = 8.0


def slow(owner: Any, name: str) -> None:
    work = getattr(owner, name)

    def after_a_while(*args: Any, **options: Any) -> Any:
        time.sleep(SECONDS)
        return work(*args, **options)

    setattr(owner, name, after_a_while)


slow(model_ranks, "load_language_model")
slow(StreamSource, "read")
slow(StreamSource, "batches")
slow(language_model_run, "TrainerGroup")
slow(Trainer, "write_sae")
main()
