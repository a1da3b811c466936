"""The metrics page: made of one status, and described in docs/metrics.md."""

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from datacache.cluster.metrics import METRICS, render

PAGE = Path(__file__).parents[2] / "docs/metrics.md"

STATUS = {
    "dataset": "train",
    "mount": "/mnt/train",
    "version": "0.1",
    "uptime": 12.5,
    "rss_bytes": 1000,
    "index": {"files": 7, "bytes": 70, "directories": 2, "stale": 1, "listings": 3},
    "tiers": [
        {"name": "mem:/dev/shm/x", "quota": 10, "used": 10, "entries": 1, "state": "full", "evicted": 4,
         "damaged": 0},
        {"name": "ssd:/var/x", "quota": 100, "used": 50, "entries": 6, "state": "ok", "evicted": 0,
         "damaged": 2, "lease": 30},
    ],
    "reads": {
        "opens": 10, "opens_whole": 8, "bytes_served": 1000, "bytes_from_cache": 900, "fetches": 5,
        "bytes_fetched": 500, "bytes_prefetched": 300, "in_flight": 1, "memory_used": 11, "memory_limit": 99,
        "errors": {"Unavailable": 2},
    },
    "sources": [
        {"uri": "s3://b", "requests": 20, "retries": 2, "failures": {"Denied": 1}, "breaker": "open"}
    ],
    "mount_requests": {"lookup": 30, "open": 10},
    "loads": [{"state": "running"}, {"state": "done"}],
    "writing": {
        "dirty_files": 4, "dirty_bytes": 400, "dirty_due": 3, "dirty_conflicts": 1,
        "landing_free_bytes": 9000,
        "uploads": {"uploads": 12, "bytes": 1200, "failures": 2},
    },
}  # fmt: skip


def samples(status: dict[str, object]) -> dict[str, float]:
    """All samples of the page, as `name{label="value",...}` without the data set."""
    found = {}
    for family in text_string_to_metric_families(render(status).decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("dataset") == status.get("dataset", "")
            spelled = ",".join(f'{k}="{v}"' for k, v in sorted(labels.items()))
            found[sample.name + (f"{{{spelled}}}" if spelled else "")] = sample.value
    return found


def test_every_figure_is_that_of_the_status() -> None:
    """Prometheus reads the page, and each metric has the status's figure."""
    assert samples(STATUS) == {
        'datacache_info{mount="/mnt/train",version="0.1"}': 1,
        "datacache_uptime_seconds": 12.5,
        "datacache_resident_bytes": 1000,
        "datacache_index_files": 7,
        "datacache_index_bytes": 70,
        "datacache_index_directories": 2,
        "datacache_index_stale_total": 1,
        "datacache_index_listings_total": 3,
        'datacache_tier_quota_bytes{tier="mem:/dev/shm/x"}': 10,
        'datacache_tier_quota_bytes{tier="ssd:/var/x"}': 100,
        'datacache_tier_limit_bytes{tier="mem:/dev/shm/x"}': 10,
        'datacache_tier_limit_bytes{tier="ssd:/var/x"}': 30,
        'datacache_tier_used_bytes{tier="mem:/dev/shm/x"}': 10,
        'datacache_tier_used_bytes{tier="ssd:/var/x"}': 50,
        'datacache_tier_entries{tier="mem:/dev/shm/x"}': 1,
        'datacache_tier_entries{tier="ssd:/var/x"}': 6,
        'datacache_tier_state{state="ok",tier="mem:/dev/shm/x"}': 0,
        'datacache_tier_state{state="full",tier="mem:/dev/shm/x"}': 1,
        'datacache_tier_state{state="broken",tier="mem:/dev/shm/x"}': 0,
        'datacache_tier_state{state="ok",tier="ssd:/var/x"}': 1,
        'datacache_tier_state{state="full",tier="ssd:/var/x"}': 0,
        'datacache_tier_state{state="broken",tier="ssd:/var/x"}': 0,
        'datacache_tier_evicted_total{tier="mem:/dev/shm/x"}': 4,
        'datacache_tier_evicted_total{tier="ssd:/var/x"}': 0,
        'datacache_tier_damaged_total{tier="mem:/dev/shm/x"}': 0,
        'datacache_tier_damaged_total{tier="ssd:/var/x"}': 2,
        "datacache_opens_total": 10,
        "datacache_opens_whole_total": 8,
        "datacache_served_bytes_total": 1000,
        "datacache_served_from_cache_bytes_total": 900,
        "datacache_fetches_total": 5,
        "datacache_fetched_bytes_total": 500,
        "datacache_prefetched_bytes_total": 300,
        "datacache_fetches_in_flight": 1,
        "datacache_memory_used_bytes": 11,
        "datacache_memory_limit_bytes": 99,
        'datacache_read_errors_total{error="Unavailable"}': 2,
        'datacache_source_requests_total{source="s3://b"}': 20,
        'datacache_source_retries_total{source="s3://b"}': 2,
        'datacache_source_failures_total{error="Denied",source="s3://b"}': 1,
        'datacache_source_breaker_open{source="s3://b"}': 1,
        'datacache_mount_requests_total{request="lookup"}': 30,
        'datacache_mount_requests_total{request="open"}': 10,
        "datacache_dirty_files": 4,
        "datacache_dirty_bytes": 400,
        "datacache_owed_operations": 3,
        "datacache_landing_free_bytes": 9000,
        "datacache_uploads_total": 12,
        "datacache_uploaded_bytes_total": 1200,
        "datacache_upload_failures_total": 2,
        "datacache_write_conflicts_total": 1,
        "datacache_loads_running": 1,
    }


def test_a_worker_without_a_mount_has_a_page() -> None:
    """What a status lacks is zero, or no sample; the page is made all the same."""
    found = samples({"dataset": "bare"})
    assert found["datacache_opens_total"] == 0
    assert not any(name.startswith("datacache_mount_requests") for name in found)


def test_labels_may_hold_anything() -> None:
    """Quotes, backslashes and line ends in a path are escaped."""
    odd = 'a"b\\c\nd'
    assert f'datacache_info{{mount="{odd}",version=""}}' in samples({"dataset": "x", "mount": odd})


def test_names_say_unit_and_kind() -> None:
    """Counters, and they alone, end in _total; names are unique and have their base unit."""
    names = [figure.name for figure in METRICS]
    assert len(set(names)) == len(names)
    for figure in METRICS:
        assert figure.name.startswith("datacache_")
        assert (figure.kind == "counter") == figure.name.endswith("_total"), figure.name
        assert not re.search(r"_(mb|kb|gib|ms|pct|percent)(_|$)", figure.name), figure.name


def test_the_page_describes_each_metric() -> None:
    """docs/metrics.md has a row for every metric, as the code says it, and no other."""
    rows = re.findall(r"^\| `(datacache_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", PAGE.read_text(), re.MULTILINE)
    expected = [
        (figure.name, figure.kind, ", ".join(f"`{label}`" for label in figure.labels), figure.about)
        for figure in METRICS
    ]
    assert rows == expected, "docs/metrics.md should have\n" + "\n".join(
        "| `{}` | {} | {} | {} |".format(*row) for row in expected
    )
