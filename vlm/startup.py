"""Start faster: importing torch and transformers makes a million objects, none of them garbage."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_gc() -> Iterator[None]:
    """Keep the cycle collector from walking modules while they are being imported.

    Saves about a tenth of the time to the first answer (``benchmarks/startup.py``).
    Leaves the collector as it found it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def skip_final_gc() -> None:
    """For a command that is about to end: leave its memory to the operating system.

    Otherwise the interpreter walks all modules once more on its way out, a third of a
    second after torch and transformers. For processes that we own, not for libraries.
    """
    gc.freeze()


def quiet_bitsandbytes() -> None:
    """Silence its advice to fetch a kernel, at every import, and a line for every 8-bit product."""
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
