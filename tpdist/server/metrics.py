"""Prometheus metrics of one node's server. Names, units and buckets are vLLM's, with the prefix tpdist_.

Counters and histograms tell of the requests that came to this node; gauges tell of the whole cluster, as the head's
latest state has it. One registry for each app: nothing is global.
"""

from collections.abc import Callable, Iterator
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tpdist.control.messages import ClusterState

FIRST_TOKEN_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class Metrics:
    """All metrics of one app. `state` is called at each scrape."""

    def __init__(self, state: Callable[[], ClusterState]) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_ClusterCollector(state))
        self.prompt_tokens = Counter(
            "tpdist_prompt_tokens", "Prompt tokens of requests, each prompt once.", registry=registry
        )
        self.generation_tokens = Counter("tpdist_generation_tokens", "Tokens generated.", registry=registry)
        self.finished = Counter(
            "tpdist_request_success",
            "Sequences that ended: stop, length, abort (the client left) or error.",
            ["finished_reason"],
            registry=registry,
        )
        self.first_token = Histogram(
            "tpdist_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.inter_token = Histogram(
            "tpdist_inter_token_latency_seconds",
            "Between two outputs of one sequence.",
            buckets=INTER_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.queue = Histogram(
            "tpdist_request_queue_time_seconds",
            "From the arrival of a sequence at the engine until it is scheduled for the first time.",
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.request = Histogram(
            "tpdist_e2e_request_latency_seconds",
            "From the arrival of a request to its last token.",
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self._registry)


class SequenceTimer:
    """Records the life of one sequence in `metrics`, from `arrived_s` (monotonic) on."""

    def __init__(self, metrics: Metrics, *, arrived_s: float) -> None:
        self._metrics = metrics
        self._arrived_s = arrived_s
        self._last_s: float | None = None
        self._scheduled = False

    def was_scheduled(self, queue_s: float) -> None:
        """It waited so long at the engine. One that another engine took up again counts once."""
        if not self._scheduled:
            self._scheduled = True
            self._metrics.queue.observe(queue_s)

    def saw_tokens(self, num_tokens: int) -> None:
        now = monotonic()
        if self._last_s is None:
            self._metrics.first_token.observe(now - self._arrived_s)
        else:
            self._metrics.inter_token.observe(now - self._last_s)
        self._last_s = now
        self._metrics.generation_tokens.inc(num_tokens)

    def ended(self, reason: str) -> None:
        self._metrics.finished.labels(reason).inc()
        if reason in ("stop", "length"):
            self._metrics.request.observe(monotonic() - self._arrived_s)


class _ClusterCollector(Collector):
    """Reads the cluster's gauges from its state when somebody scrapes."""

    def __init__(self, state: Callable[[], ClusterState]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        stats = state.stats
        ranks = [rank for node in state.nodes for rank in node.ranks]
        ready = sum(rank.state == "ready" for rank in ranks)
        expected = state.plan.get("world_size", len(ranks))
        yield _gauge("num_requests_running", "Sequences in the running batch.", stats.num_requests_running)
        yield _gauge("num_requests_waiting", "Sequences that wait for their turn.", stats.num_requests_waiting)
        yield _gauge("kv_cache_usage_perc", "Part of the KV cache in use; 1 is all of it.", stats.kv_cache_usage)
        yield _gauge("cluster_epoch", "Epoch of the process group; each failure ends one.", state.epoch)
        yield _gauge("ranks_expected", "Ranks that the cluster has by its plan.", expected)
        yield _gauge("ranks_ready", "Ranks that are ready in this epoch.", ready)
        yield _counter(
            "num_preemptions", "Sequences that lost their blocks and were computed again.", stats.preemptions
        )
        yield _counter(
            "prefix_cache_queries",
            "Prompt tokens that were looked up in the prefix cache.",
            stats.prefix_cache_queries,
        )
        yield _counter(
            "prefix_cache_hits", "Prompt tokens that were found in the prefix cache.", stats.prefix_cache_hits
        )
        yield _counter("request_retries", "Requests that went on in another epoch than they began in.", state.retried)
        yield _gauge("standbys", "Nodes that wait to take the place of a lost one.", len(state.standbys))
        yield from _of_epochs(state)
        yield from _of_ranks(state)


def _of_epochs(state: ClusterState) -> Iterator[Metric]:
    """Why epochs ended, and how long this one took to start."""
    aborts = CounterMetricFamily("tpdist_epoch_aborts", "Epochs that a failure ended, by its kind.", labels=["reason"])
    for reason, count in sorted(state.aborts.items()):
        aborts.add_metric([reason], count)
    yield aborts
    age = GaugeMetricFamily("tpdist_last_epoch_abort_age_seconds", "Since the last of them; absent without any.")
    if state.restarts:
        age.add_metric([], state.restarts[-1].age_s)
    yield age
    startup = GaugeMetricFamily(
        "tpdist_startup_phase_seconds", "How long each phase of this epoch's start took.", labels=["phase"]
    )
    for phase, seconds in state.startup_s.items():
        startup.add_metric([phase], seconds)
    yield startup


def _of_ranks(state: ClusterState) -> Iterator[Metric]:
    """What every rank says of itself, by node and rank."""
    labels = ["node", "rank"]
    age = GaugeMetricFamily(
        "tpdist_rank_last_step_age_seconds",
        "Since the rank advanced last; it grows while it has no work.",
        labels=labels,
    )
    loaded = CounterMetricFamily(
        "tpdist_weight_load_bytes", "Bytes that the rank read from the checkpoint in this epoch.", labels=labels
    )
    load_s = GaugeMetricFamily(
        "tpdist_weight_load_seconds", "How long it read them; 0 until it has read all.", labels=labels
    )
    for node in state.nodes:
        for rank in node.ranks:
            where = [node.node_id, str(rank.rank)]
            age.add_metric(where, rank.step_age_s)
            loaded.add_metric(where, rank.load_bytes)
            load_s.add_metric(where, rank.load_s)
    yield from (age, loaded, load_s)


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"tpdist_{name}", meaning, value=value)


def _counter(name: str, meaning: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"tpdist_{name}", meaning, value=value)
