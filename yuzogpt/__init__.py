"""YuzoGPT: GPT-2-class language models, trained, tuned, evaluated and served on Ray.

From text to samples:

    text -> corpus -> tokens in Arrow blocks -> rows(n) -> GPT -> loss -> checkpoint
                                                          checkpoint -> sample

In Python:

    import yuzogpt

    yuzogpt.prepare("shakespeare_char")
    run = yuzogpt.train("shakespeare_char_cpu", max_iters=200)
    print(run.load().generate("ROMEO:"))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yuzogpt.api.functions import Corpus, Run, evaluate, load, prepare, train
    from yuzogpt.api.language_model import LanguageModel
    from yuzogpt.errors import RunFailed, Stopped, UserError

__version__ = "0.1.0"

__all__ = [
    "Corpus", "LanguageModel", "Run", "RunFailed", "Stopped", "UserError", "__version__",
    "evaluate", "load", "prepare", "train",
]  # fmt: skip

HOMES = {"LanguageModel": "yuzogpt.api.language_model"} | dict.fromkeys(
    ("RunFailed", "Stopped", "UserError"), "yuzogpt.errors"
)


def __getattr__(name: str) -> Any:
    """Import what was asked for: importing the package alone imports nothing else."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES.get(name, "yuzogpt.api.functions")), name)


def __dir__() -> list[str]:
    """List the API."""
    return __all__
