"""Ray Serve: replicas of the service."""

from yuzogpt.orchestration.serve.deployment import application

__all__ = ["application"]
