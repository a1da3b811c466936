"""
Settings as who made them would write them: the way back from `parsing`, for people.

A running mount says so what it runs with, and whoever would mount it with something else is told in what
that differs. Without the environment, which is where secrets are.
"""

from collections.abc import Mapping

from datacache.config.keys import KEYS, spell_size
from datacache.config.settings import Settings, TierSettings
from datacache.model import MountPoint

KEPT = frozenset(
    (
        "uri", "manifest", "name", "snapshot", "state", "rw", "landing", "directory", "driver", "io",
        "allow-other",
    )
)  # fmt: skip
"""What stays as it is while it is mounted, whatever another daemon is started with (`fuse.broker`)."""

_OPTIONS = ("endpoint", "region", "profile", "anonymous")
"""Options of sources that are keys of their own."""


def spelled(settings: Settings) -> dict[str, str]:
    """Each key with its value as text; empty: none."""
    found = {}
    for key in KEYS.values():
        section, _, field = key.field.rpartition(".")
        if field in ("dataset", "options", "tiers"):
            continue
        value = getattr(getattr(settings, section) if section else settings, field)
        found[key.name] = "" if value is None or value == "" else key.kind.show(value)
    found["cache"] = "; ".join(map(_tier, settings.cache.tiers))
    return found | _dataset(settings)


def differing(now: Mapping[str, str], then: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What of two `spelled` is not the same, by key: the one and the other. What one of them does not know,
    since it is of another version, is passed over."""
    return {name: (now[name], then[name]) for name in then if name in now and now[name] != then[name]}


def _tier(tier: TierSettings) -> str:
    plain = TierSettings(tier.medium, tier.path, tier.quota)
    marks = [
        f",{name}={getattr(tier, name):g}"
        for name in ("high", "low")
        if getattr(tier, name) != getattr(plain, name)
    ]
    quota = f"={spell_size(tier.quota)}" if tier.quota else ""
    return f"{tier.medium}:{tier.path}{quota}{''.join(marks)}{',mounted=true' if tier.mounted else ''}"


def _dataset(settings: Settings) -> dict[str, str]:
    dataset = settings.dataset
    found = {"name": dataset.name, "manifest": dataset.manifest, "uri": ""}
    if dataset.manifest:
        given = [MountPoint(dataset.manifest, options=dataset.options)]  # its mount points are its own
    else:
        given = list(dataset.mounts)
        found["uri"] = "; ".join(
            point.uri if point.path == "/" else f"{point.uri}={point.path}" for point in given
        )
    for name in _OPTIONS:
        found[name] = _each([point.options.get(name, "") for point in given])
    found["path-style"] = _each(
        [{"path": "true", "virtual": "false"}.get(point.options.get("style", ""), "") for point in given]
    )
    found["option"] = _each(
        [
            "; ".join(
                f"{name}={value}"
                for name, value in sorted(point.options.items())
                if name not in _OPTIONS and (name, value) not in (("style", "path"), ("style", "virtual"))
            )
            for point in given
        ]
    )
    return found


def _each(texts: list[str]) -> str:
    """What mount points have: once, where it is the same."""
    return texts[0] if len(set(texts)) == 1 else " | ".join(texts)
