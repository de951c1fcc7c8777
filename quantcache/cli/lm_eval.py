"""``quantcache lm-eval``: lm-evaluation-harness with a model that reads the int8 cache."""

import sys
from typing import Any, Final

import typer

SETTINGS: Final[dict[str, Any]] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Every argument goes to the harness as it is."""


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with the model [bold]quantcache[/bold], whose scores are read through the int8 cache.

    All arguments are the harness's own; --help prints them.

    [bold]Example[/bold]

    quantcache lm-eval --model quantcache --model_args pretrained=Qwen/Qwen2.5-0.5B --tasks mmlu --num_fewshot 5
    """
    from quantcache.adapters.lm_eval import main

    sys.argv[1:] = context.args
    main()
