"""The harness's own way from WikiText's tokens to text, under a name that a task here can give."""

from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

__all__ = ["process_results", "wikitext_detokenizer"]
