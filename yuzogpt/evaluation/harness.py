"""The former name of lm_eval.py: `python -m yuzogpt.evaluation.harness` still works."""

from yuzogpt.console.terminal import complain
from yuzogpt.evaluation.lm_eval import main

if __name__ == "__main__":
    complain("yuzogpt: yuzogpt.evaluation.harness is now yuzogpt.evaluation.lm_eval")
    main()
