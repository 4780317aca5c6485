"""`yuzogpt serve`: the model, its replicas, and limits on requests."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from yuzogpt.config.sample import SamplingDeviceSettings
from yuzogpt.config.section import (
    CONTEXT,
    MODEL,
    RAY_ADDRESS,
    STORAGE,
    Count,
    Names,
    Positive,
    Section,
    read_workers,
    setting,
    worker_range,
)


class ServedModelSettings(Section):
    """Which model is served."""

    model: str = setting("out", MODEL, path="model")
    model_name: str = setting("", "model name in requests; empty: the last part of model")
    follow: bool = setting(
        False, "load the run's better checkpoints as they are written, without downtime"
    )
    follow_interval: Annotated[float, Field(gt=0)] = setting(
        5.0, "time between checks for a new checkpoint", "seconds"
    )
    context: Count = setting(0, CONTEXT, "tokens")
    context_overflow: Literal["slide", "stop"] = setting(
        "slide",
        "when the context is full; slide: drop the oldest tokens and continue; stop: end the "
        "completion",
    )
    storage: str = setting("", STORAGE)


ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:\d+)?")


def check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Return origins; ValueError for one in a form that browsers never send."""
    for origin in origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise ValueError(
                f"{origin}: write scheme, host and port, in lower case and without a path, such as "
                "http://localhost:3000, or *"
            )
    return origins


Origins = Annotated[Names, AfterValidator(check_origins)]


class HTTPSettings(Section):
    """Where the service listens."""

    host: str = setting(
        "127.0.0.1", "address to listen on; other than loopback needs --api_keys_file"
    )
    port: Annotated[int, Field(ge=0, lt=2**16)] = setting(
        8000, "port to listen on; 0: any free port"
    )
    allowed_origins: Origins = setting(
        (),
        "comma-separated origins whose pages may call the service from a browser (CORS), such as "
        "https://app.example; *: any, if API keys are required; empty: its own page only",
    )


class ReplicaSettings(Section):
    """How many replicas answer requests, and how they batch them."""

    num_replicas: Annotated[int | str, BeforeValidator(read_workers)] = setting(
        1,
        "Ray Serve replicas; 1..4: scale with the requests; 0: serve from this process, without "
        "Ray",
    )
    max_batch: Positive = setting(8, "requests that a replica decodes at once, at most", "requests")
    prefill_chunk: Positive = setting(
        64, "prompt tokens processed between two decoding steps of the other requests", "tokens"
    )
    share_weights: Literal["auto"] | bool = setting(
        "auto",
        "float32 on CPUs: replicas on a node share one copy of the weights, at a cost of "
        "up to 1/3 of their speed; auto: if there can be several replicas",
    )
    ray_address: str = setting("", RAY_ADDRESS)

    def shares(self) -> bool:
        """Return whether replicas share the weights in memory."""
        return self.span()[1] > 1 if self.share_weights == "auto" else self.share_weights

    def span(self) -> tuple[int, int]:
        """Return the smallest and largest number of replicas."""
        return worker_range(self.num_replicas, auto=1)


class LimitSettings(Section):
    """Who may make requests, and how large they may be."""

    api_keys_file: str = setting(
        "",
        "file with one API key per line, mode 0600; empty: no key required, loopback only",
        path="here",
    )
    requests_per_minute: Count = setting(
        0,
        "rate limit per API key; more get 429; 0: no limit. Each replica grants an equal share of "
        "it (of the largest number of replicas), and at least one at once",
        "requests",
    )
    max_waiting: Count = setting(
        32, "requests queued per replica beyond max_batch; more get 503", "requests"
    )
    deadline: Annotated[float, Field(gt=0)] = setting(
        120.0, "time limit of a request; then it gets 504", "seconds"
    )
    max_connections: Positive = setting(
        1000,
        "open connections per Serve proxy; beyond it, or when file descriptors run short, the one "
        "that has waited longest for its client is closed",
        "connections",
    )
    head_timeout: Annotated[float, Field(gt=0)] = setting(
        10.0, "close a connection that has not sent complete headers in this time", "seconds"
    )
    max_body_bytes: Positive = setting(2**20, "largest request body; larger ones get 413", "bytes")
    max_prompt_tokens: Positive = setting(8192, "longest prompt; longer ones get 400", "tokens")
    max_new_tokens: Positive = setting(
        2048, "largest max_tokens that a request may ask for", "tokens"
    )
    max_choices: Positive = setting(16, "most choices (prompts times n) of a request", "choices")


class ServeSettings(Section):
    """`yuzogpt serve`."""

    served: ServedModelSettings = ServedModelSettings()
    http: HTTPSettings = HTTPSettings()
    replicas: ReplicaSettings = ReplicaSettings()
    limits: LimitSettings = LimitSettings()
    device: SamplingDeviceSettings = SamplingDeviceSettings()
