"""The small parts of the controller: what waits, what a worker says, and its flags."""

import argparse
import threading
from typing import Any

import pytest

from datacache.cli.controller import read_release
from datacache.cli.main import command_parser, main
from datacache.clock import SystemClock, VirtualClock
from datacache.errors import ControlError
from datacache.kube.due import Due
from datacache.kube.figures import read_figures
from datacache.kube.phase import Figures
from datacache.model import GiB

# ---- waiting -------------------------------------------------------------------------------------


def taken(waiting: Due[str]) -> list[str]:
    found = []
    while (key := waiting.take(block=False)) is not None:
        found.append(key)
        waiting.done(key)
    return found


def test_a_burst_is_one_look_and_the_earlier_time_counts() -> None:
    clock = VirtualClock()
    waiting: Due[str] = Due(clock)
    waiting.add("a", after=10)
    waiting.add("a", after=60)
    waiting.add("b", after=5)
    waiting.add("a", after=7)
    assert taken(waiting) == []
    clock.advance(5)
    assert taken(waiting) == ["b"]
    clock.advance(2)
    assert taken(waiting) == ["a"]
    clock.advance(100)
    assert taken(waiting) == []


def test_what_comes_while_somebody_looks_is_looked_at_afterwards() -> None:
    waiting: Due[str] = Due(VirtualClock())
    waiting.add("a")
    assert waiting.take(block=False) == "a"
    waiting.add("a")
    assert waiting.take(block=False) is None, "never by two at a time"
    waiting.done("a")
    assert waiting.take(block=False) == "a"


def test_one_that_is_held_is_in_nobodys_way() -> None:
    waiting: Due[str] = Due(VirtualClock())
    waiting.add("a")
    waiting.take(block=False)
    waiting.add("a")
    waiting.add("b")
    assert waiting.take(block=False) == "b"


def test_who_waits_is_woken_by_a_key_and_by_the_end() -> None:
    waiting: Due[str] = Due(SystemClock())
    found: list[str | None] = []

    def take() -> None:
        while (key := waiting.take()) is not None:
            found.append(key)
            waiting.done(key)

    thread = threading.Thread(target=take)
    thread.start()
    waiting.add("a", after=0.01)
    waiting.add("b")
    while len(found) < 2:
        thread.join(0.01)
    waiting.close()
    thread.join()
    assert sorted(map(str, found)) == ["a", "b"]
    waiting.add("c")
    assert waiting.take() is None


# ---- what a worker says --------------------------------------------------------------------------

SAID: dict[str, Any] = {
    "tiers": [
        {"name": "mem:/m", "used": GiB, "state": "ok", "reason": ""},
        {"name": "ssd:/s", "used": 2 * GiB, "state": "broken", "reason": "Input/output error"},
    ],
    "index": {"files": 10, "bytes": 4 * GiB},
    "reads": {"opens": 8, "opens_whole": 6},
    "writing": {
        "dirty_bytes": 5,
        "dirty_files": 1,
        "dirty_due": 2,
        "dirty_unnoted": 3,
        "parked": ["/a: denied"],
    },
}


def test_figures_are_those_of_the_status() -> None:
    assert read_figures("n", SAID) == Figures(
        "n", cached=3 * GiB, files=10, bytes=4 * GiB, opens=8, opens_whole=6, dirty=5, dirty_files=4, owed=2,
        troubles=("tier ssd:/s is broken: Input/output error", "waits for a person: /a: denied"),
    )  # fmt: skip


def test_a_close_that_a_full_disk_kept_from_being_noted_is_dirty() -> None:
    writing = {"dirty_bytes": 0, "dirty_files": 0, "dirty_due": 0, "dirty_unnoted": 1}
    assert not read_figures("n", SAID | {"writing": writing}).clean


def test_one_that_is_read_only_is_clean() -> None:
    said = {key: value for key, value in SAID.items() if key != "writing"}
    assert read_figures("n", said).clean


@pytest.mark.parametrize(
    "said",
    [{}, {"tiers": 7}, SAID | {"index": {}}, SAID | {"reads": None}, SAID | {"tiers": [{"used": "much"}]}],
)
def test_what_is_no_status_is_refused(said: Any) -> None:
    with pytest.raises(ControlError, match="node n does not answer as one"):
        read_figures("n", said)


def test_troubles_are_bounded() -> None:
    writing = SAID["writing"] | {"parked": ["x" * 1000] * 100}
    found = read_figures("n", SAID | {"writing": writing}).troubles
    assert len(found) == 5 and max(map(len, found)) == 200


# ---- flags ---------------------------------------------------------------------------------------


def parsed(*words: str) -> argparse.Namespace:
    return command_parser("controller").parse(["--namespace", "dc", "--image", "r.example/dc:1", *words])


def test_the_release_is_what_the_flags_say() -> None:
    release = read_release(
        parsed(
            "--tier-root", "/mnt/a", "--tier-root", "/mnt/b", "--pull-secret", "reg", "--tier-quota", "5GiB"
        )
    )
    assert (release.namespace, release.image) == ("dc", "r.example/dc:1")
    assert release.tier_roots == ("/mnt/a", "/mnt/b")
    assert release.pull_secrets == ("reg",) and release.tier_quota == 5 * GiB
    assert release.state_dir == "/var/lib/datacache"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--namespace", "A_b"], "--namespace: 'A_b' will not do; expected a name of Kubernetes"),
        (["--image", "a b"], "--image: 'a b' will not do; expected the name of an image"),
        (["--state-dir", "x"], "--state-dir: 'x' will not do; expected an absolute path"),
        (["--tier-root", "mnt"], "--tier-root: 'mnt' will not do; expected an absolute path"),
        (["--tier-quota", "much"], "--tier-quota: 'much' will not do; expected a size"),
        (
            ["--kubeconfig", "/nowhere"],
            "kubeconfig: '/nowhere' will not do; expected a kubeconfig that can be read",
        ),
    ],
)
def test_a_wrong_flag_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["controller", "--namespace", "dc", "--image", "x", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_outside_a_cluster_it_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert main(["controller", "--namespace", "dc", "--image", "x"]) == 2
    assert "expected to run in a pod, or --kubeconfig FILE" in capsys.readouterr().err
