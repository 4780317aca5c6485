"""YuzoGPT: GPT-2-class language models, trained, tuned, evaluated and served on Ray.

From text to samples:

    text -> corpus -> tokens in Arrow blocks -> rows(n) -> GPT -> loss -> checkpoint
                                                          checkpoint -> sample
"""

__version__ = "0.1.0"
