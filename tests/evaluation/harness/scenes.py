"""The harness's own way of reading HellaSwag, under a name that a task here can give."""

from lm_eval.tasks.hellaswag.utils import process_docs

__all__ = ["process_docs"]
