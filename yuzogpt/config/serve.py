"""`yuzogpt serve`: which model, for whom, and how much of it."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from yuzogpt.config.sample import SamplingDeviceSettings
from yuzogpt.config.section import Count, Names, Positive, Section, read_workers, setting, span_of


class ServedModelSettings(Section):
    """Which model is served."""

    model: str = setting(
        "out",
        "a run (its best checkpoint), a checkpoint or Hugging Face folder, gpt2 ... gpt2-xl",
        path="model",
    )
    model_name: str = setting("", "what requests call it; empty: the last part of model")
    follow: bool = setting(False, "serve the run's better checkpoints as they come, without a gap")
    follow_interval: Annotated[float, Field(gt=0)] = setting(5.0, "between looks", "seconds")
    context: Count = setting(
        0, "what the model sees at a time; 0: its block_size; more: rotary, alibi only", "tokens"
    )
    context_overflow: Literal["slide", "stop"] = setting(
        "slide", "past the context: go on with a later window, or end there"
    )
    storage: str = setting("", "base of relative paths; needed under `ray job submit`")


ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:\d+)?")


def check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Return origins; ValueError for what browsers send none like."""
    for origin in origins:
        if origin != "*" and not ORIGIN.fullmatch(origin):
            raise ValueError(
                f"{origin}: write scheme, name and port in lower case and no path, such as "
                "http://localhost:3000, or *"
            )
    return origins


Origins = Annotated[Names, AfterValidator(check_origins)]


class HTTPSettings(Section):
    """Where it listens."""

    host: str = setting("127.0.0.1", "any other than loopback needs --api_keys_file")
    port: Annotated[int, Field(ge=0, lt=2**16)] = setting(8000, "0: any that is free")
    allowed_origins: Origins = setting(
        (),
        "whose pages may use the service from a browser (CORS), such as https://app.example; "
        "*: any, if keys are asked for; empty: its own page only",
    )


class ReplicaSettings(Section):
    """Who does the work."""

    num_replicas: Annotated[int | str, BeforeValidator(read_workers)] = setting(
        1, "on Ray Serve; 1..4: as many as requests need; 0: this process, without Ray"
    )
    max_batch: Positive = setting(8, "requests that a replica decodes at a time", "requests")
    prefill_chunk: Positive = setting(
        64, "of new prompts, between two tokens of the others", "tokens"
    )
    share_weights: Literal["auto"] | bool = setting(
        "auto",
        "float32 on CPUs: replicas of a node share one copy in memory, at up to 1/3 of their "
        "speed; auto: where there can be several",
    )
    ray_address: str = setting("", "join this Ray cluster; empty: RAY_ADDRESS, else embedded Ray")

    def shares(self) -> bool:
        """Tell whether replicas are to read the same weights in memory."""
        return self.span()[1] > 1 if self.share_weights == "auto" else self.share_weights

    def span(self) -> tuple[int, int]:
        """Return the least and the most replicas."""
        return span_of(self.num_replicas, auto=1)


class LimitSettings(Section):
    """What a request may cost, and who may make one."""

    api_keys_file: str = setting(
        "",
        "file (mode 0600) with one key a line; empty: no key is asked for, on loopback only",
        path="here",
        if_empty="",
    )
    requests_per_minute: Count = setting(
        0,
        "of each key; more get 429; 0: any number. Each replica grants an equal share of it (that "
        "of the most replicas there may be), and one at once at least",
        "requests",
    )
    max_waiting: Count = setting(32, "a replica's queue behind max_batch; more get 503", "requests")
    deadline: Annotated[float, Field(gt=0)] = setting(
        120.0, "a request that takes longer ends, with 504", "seconds"
    )
    max_connections: Positive = setting(
        1000,
        "open at a time, at each of Serve's proxies; past it, or where file descriptors run short, "
        "the one that has waited longest for its client is closed",
        "connections",
    )
    head_timeout: Annotated[float, Field(gt=0)] = setting(
        10.0, "a connection that has not brought a whole head by then is closed", "seconds"
    )
    max_body_bytes: Positive = setting(2**20, "longer requests get 413", "bytes")
    max_prompt_tokens: Positive = setting(8192, "longer prompts get 400", "tokens")
    max_new_tokens: Positive = setting(2048, "the most that max_tokens may ask for", "tokens")
    max_choices: Positive = setting(16, "prompts times n of one request", "choices")


class ServeSettings(Section):
    """`yuzogpt serve`."""

    served: ServedModelSettings = ServedModelSettings()
    http: HTTPSettings = HTTPSettings()
    replicas: ReplicaSettings = ReplicaSettings()
    limits: LimitSettings = LimitSettings()
    device: SamplingDeviceSettings = SamplingDeviceSettings()
