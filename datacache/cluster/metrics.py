"""
`Control.status` for Prometheus. The door to prometheus_client.

Nothing is counted here: a page is made from one status, so the figures are those of `datacache
status`. `METRICS` says which figure is which metric; docs/metrics.md is that table for people.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Status = Mapping[str, Any]
Samples = Iterable[tuple[tuple[str, ...], float]]
"""Values, each with those of its labels."""


class Figure(NamedTuple):
    """One metric. Every metric has the label `dataset` beside its own."""

    name: str
    kind: str
    """`gauge`, or `counter`: since the worker's start, and named *_total."""
    about: str
    labels: tuple[str, ...]
    read: Callable[[Status], Samples]


def _at(*way: str) -> Callable[[Status], Samples]:
    """The one figure at `way`."""
    return lambda status: [((), float(_follow(status, way)))]


def _follow(status: Status, way: tuple[str, ...]) -> Any:
    value: Any = status
    for step in way:
        value = value.get(step, {}) if isinstance(value, Mapping) else {}
    return value if isinstance(value, int | float) else 0


def _counts(*way: str) -> Callable[[Status], Samples]:
    """All figures of a mapping; the label is the key."""

    def read(status: Status) -> Samples:
        value: Any = status
        for step in way:
            value = value.get(step) or {}
        return [((str(key),), float(count)) for key, count in value.items()]

    return read


def _each(group: str, label: str, field: Callable[[Status], float]) -> Callable[[Status], Samples]:
    """One figure of every member of a list (tiers, sources)."""
    return lambda status: [((str(item[label]),), float(field(item))) for item in status.get(group, ())]


def _failures(status: Status) -> Samples:
    return [
        ((source["uri"], kind), float(count))
        for source in status.get("sources", ())
        for kind, count in source["failures"].items()
    ]


def _states(status: Status) -> Samples:
    return [
        ((tier["name"], state), float(tier["state"] == state))
        for tier in status.get("tiers", ())
        for state in ("ok", "full", "broken")
    ]


def _limit(tier: Mapping[str, Any]) -> float:
    lease = tier.get("lease")
    return float(tier["quota"] if lease is None else lease)


def _info(status: Status) -> Samples:
    return [((str(status.get("mount", "")), str(status.get("version", ""))), 1.0)]


METRICS: tuple[Figure, ...] = (
    Figure("datacache_info", "gauge", "1; the labels say what runs.", ("mount", "version"), _info),
    Figure("datacache_uptime_seconds", "gauge", "Seconds since the worker's start.", (), _at("uptime")),
    Figure("datacache_resident_bytes", "gauge", "Resident memory of the process.", (), _at("rss_bytes")),
    Figure("datacache_index_files", "gauge", "Files in the index.", (), _at("index", "files")),
    Figure("datacache_index_bytes", "gauge", "Their sizes added up.", (), _at("index", "bytes")),
    Figure("datacache_index_directories", "gauge", "Directories in the index.", (),
           _at("index", "directories")),
    Figure("datacache_index_stale_total", "counter", "Answers from a listing past its TTL, the store being "
           "away.", (), _at("index", "stale")),
    Figure("datacache_index_listings_total", "counter", "Directory listings fetched.", (),
           _at("index", "listings")),
    Figure("datacache_tier_quota_bytes", "gauge", "Bytes that a tier may take.", ("tier",),
           _each("tiers", "name", lambda tier: tier["quota"])),
    Figure("datacache_tier_limit_bytes", "gauge", "Bytes that it may take now: its lease, or the quota.",
           ("tier",), _each("tiers", "name", _limit)),
    Figure("datacache_tier_used_bytes", "gauge", "Bytes that it takes.", ("tier",),
           _each("tiers", "name", lambda tier: tier["used"])),
    Figure("datacache_tier_entries", "gauge", "Files that it has copies of, whole or in part.", ("tier",),
           _each("tiers", "name", lambda tier: tier["entries"])),
    Figure("datacache_tier_state", "gauge", "1 for the state that the tier is in, 0 for the others.",
           ("tier", "state"), _states),
    Figure("datacache_tier_evicted_total", "counter", "Copies evicted.", ("tier",),
           _each("tiers", "name", lambda tier: tier["evicted"])),
    Figure("datacache_tier_damaged_total", "counter", "Blocks that did not match their checksum.", ("tier",),
           _each("tiers", "name", lambda tier: tier["damaged"])),
    Figure("datacache_opens_total", "counter", "Files opened.", (), _at("reads", "opens")),
    Figure("datacache_opens_whole_total", "counter", "Of these: every byte was cached.", (),
           _at("reads", "opens_whole")),
    Figure("datacache_served_bytes_total", "counter", "Bytes given to readers.", (),
           _at("reads", "bytes_served")),
    Figure("datacache_served_from_cache_bytes_total", "counter", "Of these: read from a tier.", (),
           _at("reads", "bytes_from_cache")),
    Figure("datacache_fetches_total", "counter", "Requests to stores that brought bytes.", (),
           _at("reads", "fetches")),
    Figure("datacache_fetched_bytes_total", "counter", "Bytes that they brought.", (),
           _at("reads", "bytes_fetched")),
    Figure("datacache_prefetched_bytes_total", "counter", "Of these: before anybody asked for them.", (),
           _at("reads", "bytes_prefetched")),
    Figure("datacache_fetches_in_flight", "gauge", "Requests under way.", (), _at("reads", "in_flight")),
    Figure("datacache_memory_used_bytes", "gauge", "Of the budget of --memory: in use.", (),
           _at("reads", "memory_used")),
    Figure("datacache_memory_limit_bytes", "gauge", "The budget.", (), _at("reads", "memory_limit")),
    Figure("datacache_read_errors_total", "counter", "Failed fetches and failures of the cache.", ("error",),
           _counts("reads", "errors")),
    Figure("datacache_source_requests_total", "counter", "Requests to a store, repeated ones included.",
           ("source",), _each("sources", "uri", lambda source: source["requests"])),
    Figure("datacache_source_retries_total", "counter", "Of these: repeated another.", ("source",),
           _each("sources", "uri", lambda source: source["retries"])),
    Figure("datacache_source_failures_total", "counter", "Requests that failed.", ("source", "error"),
           _failures),
    Figure("datacache_source_breaker_open", "gauge", "1 while the store is not asked because it failed.",
           ("source",), _each("sources", "uri", lambda source: source["breaker"] != "closed")),
    Figure("datacache_mount_requests_total", "counter", "FUSE requests answered.", ("request",),
           _counts("mount_requests")),
    Figure("datacache_dirty_files", "gauge", "Files that are not in the bucket yet.", (),
           _at("writing", "dirty_files")),
    Figure("datacache_dirty_bytes", "gauge", "Their sizes added up.", (),
           _at("writing", "dirty_bytes")),
    Figure("datacache_owed_operations", "gauge", "Puts and deletes that the bucket is owed.", (),
           _at("writing", "dirty_due")),
    Figure("datacache_landing_free_bytes", "gauge", "Bytes that may still be written to the landing zone.",
           (), _at("writing", "landing_free_bytes")),
    Figure("datacache_uploads_total", "counter", "Objects put.", (),
           _at("writing", "uploads", "uploads")),
    Figure("datacache_uploaded_bytes_total", "counter", "Bytes of these.", (),
           _at("writing", "uploads", "bytes")),
    Figure("datacache_upload_failures_total", "counter",
           "Puts, copies and deletes that failed, and are tried again.", (),
           _at("writing", "uploads", "failures")),
    Figure("datacache_write_conflicts_total", "counter", "Objects that somebody else had changed meanwhile.",
           (), _at("writing", "dirty_conflicts")),
    Figure("datacache_loads_running", "gauge", "Load jobs under way.", (),
           lambda status: [((), float(sum(j["state"] == "running" for j in status.get("loads", ()))))]),
)  # fmt: skip


def render(status: Status) -> bytes:
    """The page for `status`, in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Page(status))
    return generate_latest(registry)


class _Page(Collector):
    def __init__(self, status: Status) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        return []  # names are not asked for before there is a page

    def collect(self) -> Iterator[Metric]:
        dataset = str(self._status.get("dataset", ""))
        for figure in METRICS:
            family = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
            metric = family(figure.name, figure.about, labels=("dataset", *figure.labels))
            for labels, value in figure.read(self._status):
                metric.add_metric((dataset, *labels), value)
            yield metric
