"""The one frozen configuration, checked when it is built. Bottom layer: stdlib only."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from kvshare_sglang.errors import ConfigError, UnsupportedError


def _option(default: Any, text: str, lo: float | None = None, hi: float | None = None) -> Any:
    """Never a secret: SGLang tells anyone its command line (``/server_info``)."""
    return field(default=default, metadata={"help": text, "lo": lo, "hi": hi})


@dataclass(frozen=True)
class KVShareConfig:
    """What ``--kvshare-*`` sets. Lengths are in tokens, shares in [0, 1].

    Raises ConfigError (name, value, allowed range) on a bad value and UnsupportedError
    for a sharing scope that is planned but not served.
    """

    default: str = _option(
        "auto", "what requests get that do not say: auto (reuse where it pays) or exact (as"
        " without kvshare; unless auto is given, it is what they get of a model that was not"
        " measured or whose answers do not hold)",
    )  # fmt: skip
    budget: float = _option(
        0.15,
        "share of the reused tokens, and of twice the new ones before them, that is computed again"
        " (0: copy only, 1: all; unless given, what bench calibrate found for the model)",
        0,
        1,
    )
    doubt: float = _option(
        0.0, "margin in nats over the next likeliest token, below which a greedy token of a request"
        " that reused makes all of its prompt run before it is taken (0: none does; unless given,"
        " on CPUs what bench calibrate found for the model)", 0, 1000,
    )  # fmt: skip
    doubt_shift: float = _option(
        0.0, "on CPUs with trace: where computing the chosen tokens again moves the end of a prompt"
        " by a smaller share than this, that much less of --kvshare-doubt, a quarter at least (0:"
        " all of it for every request; unless given, what bench calibrate found for the model)",
        0, 1000,
    )  # fmt: skip
    seam: int = _option(
        16,
        "last tokens of a prompt that always run; by window and dhd also tokens computed again at"
        " the start of each run taken from other text",
        0,
        4096,
    )
    select: str = _option(
        "trace", "which reused tokens are computed again: window (after edits and at seams), dhd"
        " (those, then what a check layer finds far off and attended to) or trace (what the last"
        " tokens attend to, what that attends to, and so on)"
    )  # fmt: skip
    check_layer: int = _option(1, "layer at which dhd compares copied and fresh KV", 0, 256)
    tau: float = _option(
        1000.0, "dhd computes a run again whose values deviate more than this on average", 0, 1000
    )
    refresh_every: int = _option(
        0, "with dhd or trace: while decoding, compute copied tokens again that the output turns"
        " to, at most once in so many output tokens (0: never)", 0, 4096,
    )  # fmt: skip
    refresh_rows: int = _option(24, "tokens of a request refreshed at a time", 1, 1 << 20)
    refresh_above: float = _option(
        0.2, "share of a head's attention on one copied token that makes it refresh", 0, 1
    )
    refresh_unchanged: float = _option(
        0.02, "mean change of refreshed values below which nothing was stale", 0, 1000
    )
    probe_at: float = _option(
        0.5, "depth of the layer whose attention is looked at (0: first, 1: last)", 0, 1
    )
    stretch: int = _option(
        6, "tokens on either side of one that is attended to that trace takes with it", 0, 64
    )
    depends_at: float = _option(
        0.0, "depth of the layer at which it is kept what cached tokens attended to, so that trace"
        " knows which of them rest on text that is not with them any more (0: not kept)", 0, 1,
    )  # fmt: skip
    window: int = _option(32, "tokens computed again after each edit, by window and dhd", 0, 4096)
    min_reuse: int = _option(
        64, "fewest tokens a request must save for reuse to be worth it", 1, 1 << 20
    )
    min_share: float = _option(
        0.1, "smallest share of the uncached prompt that reuse must save", 0, 1
    )
    edit_tolerance: float = _option(
        0.8, "largest share of edited tokens in a gap that is still aligned as an edit", 0, 1
    )
    source_depth: int = _option(
        1, "how many times reuse may build on reused text (0: exact sources only)", 0, 16
    )
    # The three ranges touch and never cross, so that any three values go together.
    chunk_min: int = _option(
        32, "shortest piece in which text computed after reused text is stored", 16, 64
    )
    chunk_target: int = _option(128, "length that such pieces have on average", 64, 512)
    chunk_max: int = _option(512, "longest such piece", 512, 8192)
    eviction: str = _option(
        "frequency",
        "what is evicted first: frequency (least used, with age) or sglang (its own policy, also"
        " where --radix-eviction-policy is given and this is not)",
    )
    attention: str = _option(
        "auto",
        "who attends for rows that lie apart: auto (KVShare's own kernel where it has one) or"
        " backend (SGLang's own, which takes each range of rows for a request)",
    )
    calibration: str = _option(
        "auto",
        "what is known of the model's answers: auto (looked for by model), off (the defaults as"
        " they are), or a file that bench calibrate wrote",
    )
    shadow: float = _option(
        0.0,
        "of so many reusing requests the prompt is also run in full while the server is idle, to"
        " see whether the first token is the same",
        0,
        1,
    )
    shadow_floor: float = _option(
        0.9,
        "reuse switches itself off where that is surely less often so (0: never)",
        0,
        1,
    )
    schedule: str = _option(
        "sglang",
        "who orders waiting requests: sglang (as --schedule-policy says) or kvshare (short work"
        " first, by what it costs with reuse; also by --schedule-policy kvshare)",
    )
    schedule_bound: int = _option(
        65536, "rows of later requests that may go to prefill before a waiting one, with"
        " --schedule-policy kvshare (0: first come, first served)", 0, 1 << 40,
    )  # fmt: skip
    schedule_quantum: int = _option(
        0, "fair shares between namespaces, with --schedule-policy kvshare: rows that each may send"
        " to prefill in its turn (0: no shares)", 0, 1 << 40,
    )  # fmt: skip
    ttl: float = _option(
        0.0, "share of the KV pool that finished turns may keep for the turns that follow, each for"
        " the time that was learned or that its request asks for (0: none)", 0, 0.9,
    )  # fmt: skip
    ttl_longest: float = _option(
        300.0,
        "seconds that a request may ask its turn to be kept for; more is cut to that",
        0,
        3600,
    )
    stream: str = _option(
        "", "where routers are told what is cached: tcp://HOST:PORT or ipc://PATH (empty: nowhere)"
    )
    stream_token_file: str = _option(
        "", "file with what routers must know to be told; needed where others than this user can"
        " reach --kvshare-stream (empty: the variable KVSHARE_STREAM_TOKEN)",
    )  # fmt: skip
    scope: str = _option("tenant", "who shares: tenant (one namespace: extra_key, cache_salt)")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            flag = "--kvshare-" + spec.name.replace("_", "-")
            kind = type(spec.default)
            if kind is float and type(value) is int and abs(value) < 2**53:
                value = float(value)
                object.__setattr__(self, spec.name, value)
            lo, hi = spec.metadata["lo"], spec.metadata["hi"]
            allowed = kind.__name__ if lo is None else f"{kind.__name__} in [{lo:g}, {hi:g}]"
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ConfigError(flag, value, allowed)
            if lo is not None and not lo <= value <= hi:  # also refuses nan
                raise ConfigError(flag, value, allowed)
        if self.default not in ("auto", "exact"):
            raise ConfigError("--kvshare-default", self.default, "one of auto, exact")
        if self.select not in ("window", "dhd", "trace"):
            raise ConfigError("--kvshare-select", self.select, "one of window, dhd, trace")
        if self.eviction not in ("frequency", "sglang"):
            raise ConfigError("--kvshare-eviction", self.eviction, "one of frequency, sglang")
        if self.attention not in ("auto", "backend"):
            raise ConfigError("--kvshare-attention", self.attention, "one of auto, backend")
        if self.schedule not in ("sglang", "kvshare"):
            raise ConfigError("--kvshare-schedule", self.schedule, "one of sglang, kvshare")
        if self.scope in ("group", "global"):
            raise UnsupportedError(f"scope {self.scope!r}", f"--kvshare-scope {self.scope}")
        if self.scope != "tenant":
            raise ConfigError("--kvshare-scope", self.scope, "one of tenant, group, global")
