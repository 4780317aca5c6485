"""The former name of serve/proxy.py, for Serve configs that were copied from cluster/serve.yaml."""

from yuzogpt.orchestration.serve.proxy import middlewares

__all__ = ["middlewares"]
