"""The sections, one per stage, in the order in which data flows; training's own is in ``train``."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, field_validator, model_validator

from pairloop.config.artifacts import check_place
from pairloop.config.section import Positive, Section, Share, duration_s

Durability = Literal["commit", "group", "async"]

_SERVER_URL = re.compile(r"https?://[^/?#@\s]+")


class PolicySection(Section):
    """Which model is served and trained, and how its versions are made."""

    name: str = Field(default="support-bot", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """What clients send as `model`; a policy name is its lineage of versions."""
    model: str = "starter"
    """``starter`` (the embedded default), ``fake``, a Hugging Face model directory, or a hub id."""
    method: Literal["full", "lora"] = "lora"
    """All weights, or one LoRA adapter per version; fixed for the life of a policy."""
    lora_rank: int = Field(default=16, ge=1, le=512)
    """Rank of the adapter; fixed for the life of a policy."""
    lora_alpha: int = Field(default=32, ge=1)
    """Scale of the adapter: alpha over rank."""
    lora_targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get an adapter, or ``all-linear``."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers the engine and the trainer compute with; log-probs are float32 either way."""
    quantization: Literal["none", "nf4"] = "none"
    """``nf4`` keeps the base's matrices in 4 bits (QLoRA, by bitsandbytes) in engine and trainer; LoRA only, and fixed for the
    life of a policy."""
    device: str = "auto"
    """``auto`` takes CUDA where it is, else the CPU."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the engine."""
    max_batch: int = Field(default=64, ge=1)
    """Completions sampled together by one forward pass."""
    max_loaded: int = Field(default=4, ge=2)
    """Versions kept in memory; the base, champion and challenger are never evicted."""
    engine: Literal["local", "vllm"] = "local"
    """What samples: ``local``, this process; ``vllm``, the vLLM-compatible servers of ``engine_urls``, which hold the same base
    and take adapters (``method = "lora"``). Template, scoring and training stay here (docs/engines.md)."""
    engine_urls: tuple[str, ...] = ()
    """The servers, such as ``["http://gpu-1:8000", "http://gpu-2:8000"]``, without ``/v1``; on a private network only."""
    engine_model: str | None = None
    """The base model's name on the servers, where they list more than one."""
    engine_key_env: str | None = None
    """Name of the environment variable that holds the servers' API key."""
    engine_artifacts: str | None = None
    """The artifacts folder as the servers see it; by default under the path that it has here."""
    engine_timeout: str = "120s"
    """How long a server may be silent in the middle of a request."""
    engine_poll: str = "2s"
    """How often each server is asked whether it is well and has its adapters."""
    engine_wait: str = "5m"
    """How long to wait at start for a first server that is ready."""

    @model_validator(mode="after")
    def _quantized_bases_take_adapters(self) -> Self:
        if self.quantization != "none" and self.method == "full":
            raise ValueError(f'quantization = "{self.quantization}" keeps the base as it is: set method to "lora"')
        return self

    @field_validator("engine_timeout", "engine_poll", "engine_wait")
    @classmethod
    def _durations(cls, value: str) -> str:
        duration_s(value)
        return value

    @field_validator("engine_urls")
    @classmethod
    def _roots_of_servers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            if not _SERVER_URL.fullmatch(url):
                raise ValueError(f"{url!r} is not the root of a server; write for example http://gpu-1:8000, without a path")
        if len(set(value)) < len(value):
            raise ValueError("a server is named twice")
        return value

    @model_validator(mode="after")
    def _engine_is_whole(self) -> Self:
        if self.engine == "local":
            set_keys = sorted(
                key for key in self.model_fields_set if key.startswith("engine_") and getattr(self, key) != _default(key)
            )
            if set_keys:
                raise ValueError(f'{", ".join(set_keys)}: are for engine = "vllm", and engine is "local"')
            return self
        if not self.engine_urls:
            raise ValueError('engine = "vllm" needs engine_urls, the servers that sample')
        if self.method == "full":
            raise ValueError(
                'policy.method = "full" makes versions of all weights, and engine = "vllm" takes adapters only: set method to '
                '"lora", or engine to "local"'
            )
        if self.model == "fake":
            raise ValueError('model = "fake" has no weights that a server could hold: set engine to "local"')
        return self


def _default(key: str) -> Any:
    return PolicySection.model_fields[key].default


class ServeSection(Section):
    """The HTTP side: who gets two answers, and who judges."""

    host: str = "127.0.0.1"
    """Address to listen on: loopback only, as long as there are no keys (`pairloop keys create`)."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which clients may ask for this server, beside its addresses and localhost; `*` for any. Needs a key."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may call this server from a browser, such as `https://shop.example`; none by default."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of the reverse proxies in front, such as `127.0.0.1` or `10.0.0.0/28`: of these alone
    `X-Forwarded-For` and `X-Forwarded-Proto` are believed. Needs a key or an account."""
    requests_per_minute: int = Field(default=0, ge=0)
    """Requests per minute of one key (of one address, without keys); more are answered 429. A key may have its own; 0 is no
    limit."""
    exposure_rate: Share = 1.0
    """Share of requests that opted in to two answers and get them."""
    gate_share: Share = 0.2
    """Share of raters, by hash, in the gate pool."""
    duel_share: Share = 1.0
    """Share of the gate pool's two-answer requests that are a duel while one is open."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer where the request does not say."""
    max_context: int = Field(default=0, ge=0)
    """Longest prompt plus completion in tokens; 0 takes the model's own limit."""
    max_body_bytes: int = Field(default=8_000_000, ge=1_000)
    """Longest request body; a longer one is answered 413."""
    max_file_bytes: int = Field(default=512_000_000, ge=1_000)
    """Longest body that uploads a file."""
    body_timeout: str = "30s"
    """How long a client may be silent while it sends a body, and how long one may take that comes at under 10 kB a second;
    then it is answered 408."""
    queue_limit: int = Field(default=1_024, ge=1)
    """Requests waiting for the sampler, and answers under way; one more is answered 503 with retry-after."""
    drain: str = "20s"
    """After SIGTERM, how long answers under way may take to end; then they end with an error."""
    drain_delay: str = "0s"
    """After SIGTERM, how long requests are still taken while ``/health/ready`` says 503, so that a load balancer sees it; 0s
    where there is none."""

    @field_validator("body_timeout", "drain")
    @classmethod
    def _duration(cls, value: str) -> str:
        duration_s(value)
        return value

    @field_validator("drain_delay")
    @classmethod
    def _delay(cls, value: str) -> str:
        if value != "0s":
            duration_s(value)
        return value

    @property
    def drain_delay_s(self) -> float:
        return 0.0 if self.drain_delay == "0s" else duration_s(self.drain_delay)

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in value:
            try:
                network = ip_network(proxy)
            except ValueError as error:
                raise ValueError(f"{proxy!r} is no address and no network, such as 127.0.0.1 or 10.0.0.0/28") from error
            if network.prefixlen == 0:
                raise ValueError(f"{proxy!r} is everybody: name the addresses of the proxies alone")
        return value

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}":
                raise ValueError(f"{origin!r} is not an origin, such as https://shop.example or http://localhost:3000")
        return value


class FeedbackSection(Section):
    """Which picks count."""

    min_latency_ms: int = Field(default=1_000, ge=0)
    """Human picks faster than this are kept and set aside with the reason ``instant_pick``."""
    max_picks_per_rater: int = Field(default=50, ge=1)
    """Picks of one rater that one snapshot uses; the rest are set aside with the reason ``rater_cap``."""
    repeat_share: Share = 0.05
    """Share of the labelling queue's items (and chance after a pick on the page) that are a comparison which this rater picked
    from before, sides swapped: what is said then is no vote, and measures how often picks are flipped."""
    repeat_after: int = Field(default=5, ge=1)
    """Picks of the rater between a comparison and its repeat."""
    thumb_metrics: tuple[str, ...] = ("resolved",)
    """Metrics of your own, true or false, that count as thumbs: what is said of a whole conversation, say."""
    reasons: tuple[Annotated[str, StringConstraints(min_length=1, max_length=40, pattern=r"^[^,\n]+$")], ...] = Field(
        default=("more correct", "more helpful", "clearer", "better tone", "safer"), max_length=10
    )
    """What the page offers as reasons after a pick; those that are named are kept with the comment, in its tag `reasons`."""


class LabelSection(Section):
    """Feedback for groups that nobody picked: a verifier, or a language model judge asked in both orders."""

    verifier: str | None = None
    """``module:function``; called with (messages, completion), returns a score (higher is better)."""
    judge_url: str | None = None
    """Base URL of an OpenAI-compatible server whose model judges comparisons, asked in both orders."""
    judge_model: str | None = None
    """The judge's model name."""
    judge_api_key_env: str | None = None
    """Name of the environment variable that holds the judge's key."""
    after: str = "0s"
    """Age at which a group without feedback is labelled."""

    @field_validator("after")
    @classmethod
    def _duration(cls, value: str) -> str:
        if value != "0s":
            duration_s(value)
        return value

    @property
    def after_s(self) -> float:
        return 0.0 if self.after == "0s" else duration_s(self.after)

    @model_validator(mode="after")
    def _judge_is_whole(self) -> Self:
        if (self.judge_url is None) != (self.judge_model is None):
            raise ValueError("judge_url and judge_model go together: set both or neither")
        if self.verifier is not None and self.judge_url is not None:
            raise ValueError("verifier and judge_url exclude each other: choose one labeller")
        return self


class PairsSection(Section):
    """From groups and feedback to preference pairs."""

    max_staleness: int = Field(default=1, ge=0)
    """Promotions between the version that sampled a pair and the champion; older pairs are set aside."""
    max_pairs_per_prompt: int = Field(default=64, ge=1)
    """Pairs of one prompt that one snapshot uses; the rest are set aside with the reason ``prompt_cap``."""
    heldout_share: Share = 0.1
    """Share of prompts held out, by hash, where no rater pool splits them (imported and one-off data)."""
    max_chars: int = Field(default=200_000, ge=1)
    """Longest prompt plus answer of an imported row, in characters."""


class EvaluateSection(Section):
    """The offline report before any traffic is spent."""

    prompts: int = Field(default=64, ge=8)
    """Recent prompts of the gate pool sampled from champion and challenger."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer of the offline report."""
    keep_samples: int = Field(default=6, ge=0, le=50)
    """So many prompts of the offline report are kept with what challenger and champion said, for the version's page. They are
    sampled anyway; each goes when the request that its prompt came from is erased, deleted or too old (``privacy``)."""
    suite: str | None = None
    """File of cases, from the state directory: JSON lines of ``messages`` and ``must_match``, ``must_not_match`` (regular
    expressions) or ``must_be_json``, which the greedy answer is checked against; ``name`` is what the report calls it."""


Requirement = Literal["sides", "adjusted_win_rate", "worst_slice", "verifier", "seed_duel", "heldout_accuracy", "suite"]
"""What ``gate.require`` may name."""


class GateSection(Section):
    """What a challenger must show (SCIENCE: mixture e-process on duel picks, then guardrails)."""

    alpha: float = Field(default=0.05, gt=0.0, lt=0.5)
    """Chance of promoting a challenger that is no better: per duel, or with ``spending = "lifetime"`` ever."""
    spending: Literal["duel", "lifetime"] = "duel"
    """``lifetime`` gives the r-th duel of a policy alpha · 6 / (π² r²), which adds up to alpha however many there are."""
    cluster: Literal["pick", "rater_day", "rater"] = "rater_day"
    """How picks of one rater count: ``rater_day`` the first decisive one of each UTC day; ``rater`` the first
    ``max_picks_per_rater`` together as one vote (for duels of several days among the same people, whose tastes differ);
    ``pick`` each of these as a vote of its own, which errs where people have tastes."""
    max_picks_per_rater: int = Field(default=6, ge=1)
    """Picks of one rater that a duel counts with ``cluster = "rater"`` or ``"pick"``."""
    robust: float = Field(default=0.0, ge=0.0, lt=0.5)
    """The duel must be won without this share of raters, too, those most favourable to the challenger; 0.1 withstands a tenth
    of raters who collude."""
    min_picks: int = Field(default=50, ge=1)
    """Decisive picks before the gate says anything but CONTINUE."""
    min_raters: int = Field(default=30, ge=1)
    """Raters before the gate says anything but CONTINUE."""
    max_picks: int = Field(default=2_000, ge=1)
    """Picks after which an undecided duel is HOLD."""
    max_hours: Positive = 24.0
    """Hours after which an undecided duel is HOLD."""
    ties: Literal["drop", "half"] = "drop"
    """``drop`` ties, or count each as half a win and half a loss."""
    min_length_ratio: Positive = 0.7
    """Lower bound of the answer length over the champion's."""
    max_length_ratio: Positive = 1.4
    """Upper bound of the answer length over the champion's."""
    min_entropy_ratio: Share = 0.5
    """Lower bound of the entropy per answer over the base's."""
    max_kl_to_base: Positive = 50.0
    """Nats per completion."""
    max_bad_share: Share = 0.05
    """Points by which the share of truncated or empty answers may exceed the champion's."""
    max_verifier_drop: float = Field(default=0.05, ge=0.0)
    """What the verifier's mean score may lose to the champion's, in the verifier's own points."""
    min_seed_win_rate: Share = 0.5
    """Lower bound of the win rate against the base: by the verifier or judge on the offline report's samples where one is
    asked, else by raters in the live duel of ``seed_share``."""
    seed_share: float = Field(default=0.0, ge=0.0, le=0.5)
    """Share of the duel's requests that the challenger answers beside the base instead of the champion, for ``seed_duel``.
    Where the base is the champion, all of them are against the base anyway."""
    max_suite_lost: int = Field(default=0, ge=0)
    """Cases of ``evaluate.suite`` that the champion passes and the challenger may fail."""
    min_heldout_accuracy: Share = 0.5
    """Share of held-out pairs that the challenger must get right, with the champion as reference."""
    max_judge_flips: Share = 0.5
    """Share of comparisons in which a judge may contradict itself when the order is swapped; above, an offline duel is HOLD."""
    slices: tuple[str, ...] = ()
    """Keys of the requests' ``metadata`` by whose values the duel is looked at apart; a slice in which the champion is shown
    to be better is REJECT."""
    min_slice_picks: int = Field(default=30, ge=1)
    """Decisive votes from which a slice counts as looked at."""
    require: tuple[Requirement, ...] = ()
    """What must be shown besides the duel and the four limits above, else HOLD: ``sides`` (that they were a fair coin),
    ``adjusted_win_rate`` (a gain beyond side and length), ``worst_slice``, ``verifier``, ``seed_duel``, ``heldout_accuracy``,
    ``suite``.
    Without it these can stop a version where they are known, and are not missed where they are not."""
    offline_prompts: int = Field(default=400, ge=1)
    """Prompts of the offline duel where a verifier or judge labels and there is no traffic to duel on."""
    offline: bool = False
    """Duel offline, with the configured verifier or judge on held-out prompts, instead of on live traffic."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.min_picks > self.max_picks:
            raise ValueError("min_picks must not exceed max_picks")
        if self.min_length_ratio >= self.max_length_ratio:
            raise ValueError("min_length_ratio must be below max_length_ratio")
        return self

    @model_validator(mode="after")
    def _requirements_can_be_met(self) -> Self:
        if "worst_slice" in self.require and not self.slices:
            raise ValueError('require names "worst_slice", but slices names no metadata key: slices = ["language"], say')
        live = sorted({"sides", "adjusted_win_rate", "worst_slice"} & set(self.require))
        if self.offline and live:
            raise ValueError(f"an offline duel has no sides, raters or slices: take {', '.join(live)} out of require")
        if self.offline and self.seed_share:
            raise ValueError(
                "an offline duel has no requests to share: set seed_share = 0, the verifier or judge knows the base"
            )
        return self


class StoreSection(Section):
    """Where evidence and artifacts live."""

    database: str | None = None
    """SQLAlchemy URL; by default SQLite in the state directory."""
    artifacts: str | None = None
    """Folder of datasets and versions, or a URL such as ``s3://bucket/pairloop`` where several machines share them; by default
    ``artifacts`` in the state directory."""
    artifacts_options: dict[str, Any] = Field(default={})
    """What fsspec is told of that URL, such as ``{endpoint_url = "http://minio:9000"}``; never a secret: those come from the
    environment, as everywhere on AWS."""
    artifacts_cache_gb: float = Field(default=20.0, gt=0)
    """Of what lies at a URL, so much is kept in ``cache`` in the state directory; the longest unused goes first."""
    artifacts_checkpoints: bool = True
    """Whether the newest checkpoint of a run or fine-tuning job is kept at that URL, too, until it ends: another machine then
    goes on from it. Of a full model it is some three times its size."""
    durability: Durability = "group"
    """When a write is acknowledged. ``group``: once it is on the disk (fsync), together with all that waited with it.
    ``commit``: the same, each write in a transaction and an fsync of its own; slow. ``async``: once it is committed, and on the
    disk within a second: survives a killed process, but not always a power failure."""
    max_waiting: int = Field(default=2_048, ge=1)
    """Writes of clients that may wait for the database; beyond, they are refused with 503 and ``retry-after``."""
    max_wait: str = "5s"
    """How long the oldest write may have been waiting before clients' further writes are refused in the same way."""

    @model_validator(mode="after")
    def _artifacts_are_somewhere(self) -> Self:
        check_place(self.artifacts, self.artifacts_options)
        return self

    @field_validator("max_wait")
    @classmethod
    def _durations(cls, value: str) -> str:
        duration_s(value)
        return value
