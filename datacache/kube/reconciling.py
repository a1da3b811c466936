"""
One Dataset brought to what it should be, as far as that goes now.

`Reconciler.look` reads what there is, has `manifests` and `phase` say what should be, and makes the
difference. It begins from nothing each time, so it may be killed at any line and called again; what is there
already is not written again. The order of a deletion is what keeps data:

1. the claim goes: no new pod can use it, and Kubernetes keeps it until the last one that does has ended;
2. workers stay until all that was written is in the bucket, or the owner gives it up (`phase.blockers`);
3. that nothing holds it is written into the status, since nobody can ask workers that are gone;
4. everything else goes, and the finalizer last.

Threads may look at different Datasets at once; `due` keeps them from one.
"""

import base64
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from datacache.clock import Clock
from datacache.errors import ClusterError, Conflicting, SettingError
from datacache.kube import marks, phase
from datacache.kube.api import OURS, Api
from datacache.kube.asking import Asking
from datacache.kube.authority import Authorities
from datacache.kube.beside import (
    TOKEN_LIFE,
    Beside,
    Token,
    Twin,
    check_twins,
    copied_keys,
    is_good,
    read_manifest,
    renewal,
    twin_of,
)
from datacache.kube.certificates import Pair, is_good_pair, issue
from datacache.kube.dataload import ENDED, Node, fits, jobs_of
from datacache.kube.figures import read_figures
from datacache.kube.manifests import (
    CLAIM,
    IDENTITY,
    MANIFEST,
    UID_LABEL,
    affinity_of,
    is_placed_otherwise,
    known_pair,
    known_tokens,
    name_of,
    names,
    node_label,
    objects,
    rare_parts,
    told_pair,
    told_tokens,
    worker_name,
)
from datacache.kube.phase import Figures, Observed, Workers
from datacache.kube.release import GROUP, Key, Name, Release, volume_name
from datacache.kube.spec import WRITE, DatasetSpec, read_dataset
from datacache.kube.writers import cannot_write
from datacache.telemetry import redact

_log = logging.getLogger(__name__)

FINALIZER = f"{GROUP}/dataset"
AGAIN = 30.0
"""Seconds until workers are asked again: as old the figures in a status are."""
QUIET = 300.0
"""Seconds until a Dataset without workers is looked at again, should an event have been missed."""
GOING = 2.0
"""Seconds until a deletion is looked at again, and workers whose change has to wait."""
LATE = 60.0
"""Seconds that a pod may wait for the worker of its node before it is told why."""
IDLE = 600.0
"""Seconds after which a node that nobody uses the Dataset on loses its worker (and keeps the copies)."""

Object = dict[str, Any]


class Reconciler:
    """Looks at Datasets. `nodes_of` says on which nodes pods use a claim, `pods_of` which pods (by uid); in a
    block of `workers`, which says whether it may, workers are changed.

    State, of each Dataset by one thread at a time: `_applied` is what was applied last to which version of
    an object, `_idle` since when a node is not wanted, `_late` since when pods wait for a worker (None: they
    were told), `_marked` which nodes are marked for it, that are known of, `_judged` the pods of which it is
    known whether they can write, `_swept` whether what nobody would expect was looked for."""

    def __init__(
        self, api: Api, release: Release, asking: Asking, *, clock: Clock,
        nodes_of: Callable[[Key], Iterable[str]], pods_of: Callable[[Key], Iterable[str]],
        authorities: Authorities, workers: Callable[[], AbstractContextManager[bool]],
    ) -> None:  # fmt: skip
        self._api, self._release, self._asking = api, release, asking
        self._clock, self._nodes_of, self._pods_of = clock, nodes_of, pods_of
        self._authorities, self._workers_may = authorities, workers
        self._applied: dict[Name, tuple[str, Object]] = {}
        self._idle: dict[tuple[str, str], float] = {}
        self._late: dict[Key, dict[str, float | None]] = {}
        self._marked: dict[str, set[str]] = {}
        self._judged: dict[Key, frozenset[str]] = {}
        self._swept: dict[str, bool] = {}

    def look(self, key: Key) -> float | None:
        """Look at the Dataset; seconds until the next look, None when there is none any more. Raises
        ClusterError: then it is to be tried again."""
        obj = self._api.get(Name(OURS, "Dataset", key.namespace, key.name))
        if obj is None:
            again = None
        elif obj["metadata"].get("deletionTimestamp"):
            again = self._take_away(key, obj)
        else:
            if FINALIZER not in (obj["metadata"].get("finalizers") or ()):
                obj = self._api.finalizers(obj, [*(obj["metadata"].get("finalizers") or ()), FINALIZER])
            again = self._provide(key, obj)
        return again

    # ---- what should be ---------------------------------------------------------------------------

    def _provide(self, key: Key, obj: Object) -> float:
        spec, refused, lack, failed = None, "", _Lack("", ""), ""
        try:
            spec = read_dataset(obj, self._release)
        except SettingError as error:
            refused = str(error)
        # The second look after a restart is for what one that was killed left; first ones are many at once.
        uid = obj["metadata"]["uid"]
        sweep = self._swept.get(uid) is False
        self._swept[uid] = uid in self._swept
        there = self._there(key, obj, spec, all=sweep)
        if spec is not None:
            try:
                lack = self._make(spec, there)
            except ClusterError as error:
                if not _final(error):
                    raise
                failed = str(error)
        if refused or lack.reason:
            # Whatever is wrong with the rest by now: workers that are at work go on to be who they are.
            self._keep_identity(key, obj["metadata"]["uid"], there)
            self._keep_certificate(obj["metadata"]["uid"], there)
        pods = self._asking.pods(obj["metadata"]["uid"])
        figures = self._figures(obj, pods)
        clean = {each.node for each in figures if each.clean}
        labelled, barred = self._labels(key, obj, spec, clean=clean)
        claim = self._claim_phase(key, obj)
        volume = there.get(self._volume(obj["metadata"]["uid"]))
        seen = Observed(
            generation=obj["metadata"]["generation"],
            writable=_writable(obj),
            refused=refused,
            missing=lack.message,
            lacks=lack.reason,
            failed=failed,
            claim=claim,
            placed_otherwise=spec is not None and is_placed_otherwise(spec, affinity_of(volume)),
            workers=self._workers(obj),
            figures=tuple(figures),
            ended=tuple(sorted(filter(None, map(_ended, pods)))),
            silent=tuple(sorted(labelled - {each.node for each in figures})),
        )
        self._mark(obj, seen)
        self._tell(obj, seen)
        why = dict.fromkeys(barred, "the nodeAffinity of the Dataset keeps workers from it")
        self._warn_users(key, {node: _why(pods, node) for node in seen.silent} | why)
        if spec is not None and spec.writable:
            self._warn_writers(key, spec)
        if lack.later:
            return GOING
        return AGAIN if pods or labelled or lack.reason or claim != "Bound" else QUIET

    def _make(self, spec: DatasetSpec, there: dict[Name, Object]) -> "_Lack":
        """Have there be what should; or what it is that keeps it from that."""
        claim = Name("v1", "PersistentVolumeClaim", spec.namespace, spec.name)
        if claim in there and not _ours(there[claim], spec.uid):
            raise ClusterError(
                f"a PersistentVolumeClaim {spec.name} is there already, of somebody else", status=409
            )
        beside = self._beside(spec, there)
        if isinstance(beside, _Lack):
            return beside
        placed = affinity_of(there.get(self._volume(spec.uid)))
        token = self._token(spec, there)
        pair = self._certificate(spec.uid, known_pair(there.get(self._tls(spec.uid))))
        wanted = objects(spec, self._release, beside=beside, token=token, placed=placed, tls=pair)
        done = [self._apply(obj, there.get(name_of(obj))) for obj in wanted]
        for name in there.keys() - {name_of(obj) for obj in wanted}:
            if not there[name]["metadata"].get("deletionTimestamp"):  # workers of before may hold it
                self._api.delete(name, uid=there[name]["metadata"]["uid"])
        self._reclaim(spec, there)
        return _Lack("", "", later=not all(done))

    # ---- what lies beside it ------------------------------------------------------------------------

    def _beside(self, spec: DatasetSpec, there: Mapping[Name, Object]) -> "Beside | _Lack":
        """What it names in its namespace; or what of that will not do."""
        reason = "SecretMissing"
        try:
            keys = self._keys(spec)
            reason = "ClaimUnusable"
            twins = self._twins(spec)
            reason = "ManifestUnusable"
            listed = self._manifest(spec)
            reason = "NoIdentity"
            return Beside(keys, twins, listed, self._tokens(spec, there))
        except SettingError as error:
            return _Lack(reason, str(error))

    def _keys(self, spec: DatasetSpec) -> dict[str, str]:
        found = {name: self._api.get(Name("v1", "Secret", spec.namespace, name)) for name in spec.secrets}
        return copied_keys(spec, {name: each.get("data") or {} for name, each in found.items() if each})

    def _twins(self, spec: DatasetSpec) -> tuple[Twin, ...]:
        found: dict[str, Twin] = {}
        for mount in spec.mounts:
            if not mount.claim or mount.claim in found:
                continue
            claim = self._api.get(Name("v1", "PersistentVolumeClaim", spec.namespace, mount.claim))
            behind = str(((claim or {}).get("spec") or {}).get("volumeName") or "")
            volume = self._api.get(Name("v1", "PersistentVolume", "", behind)) if behind else None
            found[mount.claim] = twin_of(mount, claim, volume, spec)
        twins = tuple(found[name] for name in sorted(found))
        check_twins(spec, twins)
        return twins

    def _manifest(self, spec: DatasetSpec) -> bytes:
        if spec.manifest is None or not spec.manifest.config_map:
            return b""
        name = Name("v1", "ConfigMap", spec.namespace, spec.manifest.config_map)
        return read_manifest(spec, self._api.get(name))

    def _tokens(self, spec: DatasetSpec, there: Mapping[Name, Object]) -> tuple[Token, ...]:
        """The web identities: those of before, for most of their life."""
        known = {each.audience: each for each in known_tokens(there.get(self._identity(spec.uid)))}
        account = Name("v1", "ServiceAccount", spec.namespace, spec.account)
        return tuple(self._renewed(account, audience, known.get(audience)) for audience in spec.audiences)

    def _renewed(self, account: Name, audience: str, before: Token | None) -> Token:
        now = self._clock.wall()
        if before is not None and is_good(before, account=account.name, now=now):
            return before
        try:
            value, expires = self._api.token(account, audience, seconds=TOKEN_LIFE)
        except ClusterError as error:
            if error.status == 404:
                expected = f"a ServiceAccount that there is in namespace {account.namespace}"
                raise SettingError("spec.serviceAccountName", account.name, expected) from error
            if error.status == 403:
                expected = "one for which the controller may ask tokens (the chart's webIdentity)"
                raise SettingError("spec.serviceAccountName", account.name, expected) from error
            if before is None or before.of != account.name:
                raise
            _log.warning("%s/%s: no other token was given (%s)", account.namespace, account.name, error)
            return before
        return Token(audience, value, renew=renewal(expires, now), of=account.name)

    def _keep_identity(self, key: Key, uid: str, there: Mapping[Name, Object]) -> None:
        """Have the web identities that there are be good ones, as long as the operator lets them be."""
        before = known_tokens(there.get(self._identity(uid)))
        try:
            after = tuple(
                self._renewed(Name("v1", "ServiceAccount", key.namespace, each.of), each.audience, each)
                if each.audience in self._release.audiences else each
                for each in before
            )  # fmt: skip
        except SettingError as error:
            _log.warning("%s/%s: no other token was asked for (%s)", *key, error)
            return
        if after != before:
            self._api.merge(self._identity(uid), told_tokens(after))

    def _certificate(self, uid: str, before: Pair | None) -> Pair:
        """The workers' certificate: that of before, as long as it will do."""
        authority, now = self._authorities.current(), self._clock.wall()
        called = [worker_name(uid, self._release)]
        if before is not None and is_good_pair(before, authority, called, now):
            return before
        return issue(authority, called, now)

    def _keep_certificate(self, uid: str, there: Mapping[Name, Object]) -> None:
        """Have the certificate that there is be a good one."""
        if (secret := there.get(self._tls(uid))) is not None:
            before = known_pair(secret)
            if (after := self._certificate(uid, before)) != before:
                self._api.merge(self._tls(uid), told_pair(after))

    def _tls(self, uid: str) -> Name:
        return Name("v1", "Secret", self._release.namespace, f"{volume_name(uid)}-tls")

    def _identity(self, uid: str) -> Name:
        return Name("v1", "Secret", self._release.namespace, f"{volume_name(uid)}-identity")

    # ---- what is made -------------------------------------------------------------------------------

    def _token(self, spec: DatasetSpec, there: Mapping[Name, Object]) -> str:
        name = next(each for each in self._names(Key(spec.namespace, spec.name), spec.uid)
                    if each.kind == "Secret" and each.name.endswith("-token"))  # fmt: skip
        known = (there.get(name, {}).get("data") or {}).get("token")
        return known or base64.b64encode(secrets.token_hex(32).encode()).decode()

    def _apply(self, obj: Object, there: Object | None) -> bool:
        """Have `obj` be there. Nothing is sent when it is, or when just this was the last that was sent to
        just that: the API writes some values in its own way. False: workers may not be changed just now."""
        name = name_of(obj)
        if there is not None:
            if there["metadata"].get("deletionTimestamp"):
                return True  # it is made anew when it has gone
            if _within(obj, there) or self._applied.get(name) == (_version(there), obj):
                return True
        if name.kind == "DaemonSet" and there is not None:
            with self._workers_may() as may:
                if not may:
                    return False
                after = self._api.apply(obj)
        else:
            after = self._api.apply(obj)
        self._applied[name] = (_version(after), obj)
        return True

    def _reclaim(self, spec: DatasetSpec, there: Mapping[Name, Object]) -> None:
        """A claim that somebody deleted is made again, and the volume still waits for the one before. Nobody
        uses it then: it may be made anew, where it should be another."""
        for name, volume in there.items():
            if volume["metadata"].get("deletionTimestamp") or name.kind != "PersistentVolume":
                continue
            if (volume.get("status") or {}).get("phase") != "Released":
                continue
            if name == self._volume(spec.uid) and is_placed_otherwise(spec, affinity_of(volume)):
                self._api.delete(name, uid=volume["metadata"]["uid"])
            else:
                self._api.merge(name, {"spec": {"claimRef": {"uid": None, "resourceVersion": None}}})

    # ---- nodes ------------------------------------------------------------------------------------

    def _labels(
        self, key: Key, obj: Object, spec: DatasetSpec | None, *, clean: set[str]
    ) -> tuple[set[str], set[str]]:
        """Label the nodes that should have a worker, and after a while no others; those that are labelled,
        and those that would be, if the Dataset's nodeAffinity let them.

        Of a Dataset that is written a node keeps its label until its worker says that it is `clean`: the
        label is what tells that something may lie there, and the worker who sends it.
        """
        uid = obj["metadata"]["uid"]
        label = node_label(uid)
        nodes = self._api.list("v1", "Node", labels=f"{label}=true")
        labelled = {each["metadata"]["name"] for each in nodes}
        self._marked.setdefault(uid, set()).update(
            each["metadata"]["name"]
            for each in nodes
            if marks.is_marked(each["metadata"].get("annotations") or {}, uid)
        )
        wanted = set(self._nodes_of(key))
        if spec is not None and spec.node_selector:
            chosen = ",".join(f"{name}={value}" for name, value in sorted(spec.node_selector.items()))
            wanted |= {each["metadata"]["name"] for each in self._api.list("v1", "Node", labels=chosen)}
        wanted |= self._loading(key)
        wanted |= set(((obj.get("status") or {}).get("dirty") or {}).get("nodes") or ())
        now = self._clock.monotonic()
        barred = set()
        for node in wanted - labelled:
            found = self._api.get(Name("v1", "Node", "", node))
            if found is None:
                continue
            if spec is not None and not _may_have(found, spec):
                barred.add(node)
            elif self._label(node, label, "true"):
                labelled.add(node)
        for node in wanted:
            self._idle.pop((uid, node), None)
        for node in labelled - wanted:
            idle = now - self._idle.setdefault((uid, node), now) >= IDLE and node not in self._marked[uid]
            if idle and spec is not None and (node in clean or not _writable(obj)):
                self._label(node, label, None)
                del self._idle[uid, node]
                labelled.discard(node)
        return labelled, barred

    def _mark(self, obj: Object, seen: Observed) -> None:
        """Keep autoscalers from nodes that hold what is not in the bucket, and from no others. Of a node that
        has changed since it was read (another Dataset's mark, perhaps) the API refuses it: look again."""
        if not seen.writable:
            return
        uid = obj["metadata"]["uid"]
        dirty = set(phase.dirty_nodes(seen, obj.get("status") or {}))
        for node in dirty | self._marked.get(uid, set()):
            found = self._api.get(Name("v1", "Node", "", node))
            if found is not None:
                self._mark_node(found, uid, dirty=node in dirty)
        self._marked[uid] = dirty

    def _mark_node(self, node: Object, uid: str, *, dirty: bool) -> None:
        metadata = node["metadata"]
        changed = marks.change(metadata.get("annotations") or {}, uid, dirty=dirty)
        if changed:
            patch = {"metadata": {"annotations": changed, "resourceVersion": metadata["resourceVersion"]}}
            self._api.merge(Name("v1", "Node", "", metadata["name"]), patch)

    def _loading(self, key: Key) -> set[str]:
        """Nodes on which a DataLoad is at work, or is to be."""
        found = set()
        for load in self._api.list(OURS, "DataLoad", namespace=key.namespace):
            status = load.get("status") or {}
            ended = load["metadata"].get("deletionTimestamp") or status.get("phase") in ENDED
            if load["spec"]["dataset"]["name"] == key.name and not ended:
                found |= set(jobs_of(status))
        return found

    def _label(self, node: str, label: str, value: str | None) -> bool:
        """Whether there is such a node, which has (or no longer has) the label now."""
        try:
            self._api.merge(Name("v1", "Node", "", node), {"metadata": {"labels": {label: value}}})
        except ClusterError as error:
            if error.status == 404:
                return False
            raise
        return True

    # ---- what there is ----------------------------------------------------------------------------

    @staticmethod
    def _volume(uid: str) -> Name:
        return Name("v1", "PersistentVolume", "", volume_name(uid))

    def _names(self, key: Key, uid: str) -> tuple[Name, ...]:
        return names(uid=uid, namespace=key.namespace, name=key.name, release=self._release)

    def _there(
        self, key: Key, obj: Object, spec: DatasetSpec | None, *, all: bool = False
    ) -> dict[Name, Object]:
        """What stands there of it. `all`: what nobody would expect, too."""
        uid = obj["metadata"]["uid"]
        rare = {f"{volume_name(uid)}-{part}" for part in (IDENTITY, MANIFEST)}
        every = self._names(key, uid)
        found = {name: self._api.get(name) for name in every if all or name.name not in rare}
        daemon_set = next(each for name, each in found.items() if name.kind == "DaemonSet")
        parts = {IDENTITY, MANIFEST, CLAIM} if all else rare_parts(spec, daemon_set)
        found |= {
            name: self._api.get(name)
            for name in every
            if name not in found and name.name.removeprefix(f"{volume_name(uid)}-") in parts
        }
        there = {name: each for name, each in found.items() if each is not None}
        if CLAIM not in parts:
            return there
        # Twins have names that depend on what they are twins of.
        for kind, namespace in (("PersistentVolumeClaim", self._release.namespace), ("PersistentVolume", "")):
            for each in self._api.list("v1", kind, namespace=namespace, labels=f"{UID_LABEL}={uid}"):
                name = Name("v1", kind, namespace, each["metadata"]["name"])
                there.setdefault(name, each | {"apiVersion": "v1", "kind": kind})
        return there

    def _claim_phase(self, key: Key, obj: Object) -> str:
        claim = self._api.get(Name("v1", "PersistentVolumeClaim", key.namespace, key.name))
        if claim is None or not _ours(claim, obj["metadata"]["uid"]):
            return ""
        return str((claim.get("status") or {}).get("phase") or "Pending")

    def _workers(self, obj: Object) -> Workers | None:
        key = Key(obj["metadata"]["namespace"], obj["metadata"]["name"])
        name = next(each for each in self._names(key, obj["metadata"]["uid"]) if each.kind == "DaemonSet")
        daemon_set = self._api.get(name)
        if daemon_set is None:
            return None
        said = daemon_set.get("status") or {}
        return Workers(
            wanted=said.get("desiredNumberScheduled", 0),
            ready=said.get("numberReady", 0),
            updated=said.get("updatedNumberScheduled", 0),
            current=said.get("observedGeneration") == daemon_set["metadata"]["generation"],
        )

    def _figures(self, obj: Object, pods: list[Object]) -> list[Figures]:
        """What the workers in `pods` say. Who does not answer says nothing."""
        workers = self._asking.reach(obj["metadata"]["uid"], pods) if pods else {}
        said = self._asking.ask(workers, lambda node, worker: read_figures(node, worker.status()))
        return list(said.values())

    # ---- telling ----------------------------------------------------------------------------------

    def _tell(self, obj: Object, seen: Observed) -> Object:
        """The status that `seen` makes, written where it is another; and the events of the difference."""
        before, now = obj.get("status") or {}, phase.rfc3339(self._clock.wall())
        after = phase.status(seen, before, now=now)
        if after != before:
            name = Name(OURS, "Dataset", obj["metadata"]["namespace"], obj["metadata"]["name"])
            gone: Object = dict.fromkeys(before.keys() - after.keys())
            self._api.merge(name, {"status": gone | after}, part="status")
            for each in phase.news(before, after):
                self._post(obj, each)
        return after

    def _post(self, obj: Object, news: phase.News, *, once: bool = False) -> None:
        """`once`: whoever acts after us does not say it again."""
        try:
            self._api.post(obj, *news, now=phase.rfc3339(self._clock.wall()), once=once)
        except Conflicting:
            pass
        except ClusterError as error:  # nobody depends on it
            _log.warning("%s: no event was posted (%s)", obj["metadata"]["name"], error)

    def _warn_users(self, key: Key, silent: Mapping[str, str]) -> None:
        """Tell the pods that have waited for a worker for too long, once each, why it does not come, which
        `silent` has by node."""
        late: dict[str, float | None] = {}
        if silent:
            known, now = self._late.get(key, {}), self._clock.monotonic()
            for pod in self._api.list("v1", "Pod", namespace=key.namespace):
                uid, node = pod["metadata"]["uid"], pod["spec"].get("nodeName")
                if node not in silent or key.name not in claims_of(pod):
                    continue
                since = known.get(uid, now)
                if since is not None and now - since >= LATE:
                    why = f"the worker of Dataset {key.name} on node {node} is not there: {silent[node]}"
                    news = phase.News("Warning", "WorkerNotReady", why)
                    self._post(pod | {"apiVersion": "v1", "kind": "Pod"}, news)
                    since = None
                late[uid] = since
        self._late[key] = late

    def _warn_writers(self, key: Key, spec: DatasetSpec) -> None:
        """Tell pods that mount it to write and cannot, once each, why."""
        users = frozenset(self._pods_of(key))
        fresh = users - self._judged.get(key, frozenset())
        for pod in self._api.list("v1", "Pod", namespace=key.namespace) if fresh else ():
            said = ""
            if pod["metadata"]["uid"] in fresh and key.name in claims_of(pod):
                said = cannot_write(pod, claim=key.name, dataset=key.name, owner=spec.mount)
            if said:
                news = phase.News("Warning", "CannotWrite", said)
                self._post(pod | {"apiVersion": "v1", "kind": "Pod"}, news, once=True)
        self._judged[key] = users

    # ---- deletion ---------------------------------------------------------------------------------

    def _take_away(self, key: Key, obj: Object) -> float | None:
        metadata = obj["metadata"]
        if FINALIZER not in (metadata.get("finalizers") or ()):
            return None  # ours is off; others hold it
        there = self._there(key, obj, None, all=True)
        claim = Name("v1", "PersistentVolumeClaim", key.namespace, key.name)
        mine = claim in there and _ours(there[claim], metadata["uid"])
        if not mine:
            there.pop(claim, None)
        elif not there[claim]["metadata"].get("deletionTimestamp"):
            self._api.delete(claim, uid=there[claim]["metadata"]["uid"])
        seen = self._seen_going(key, obj, there, claimed=mine)
        after = self._tell(obj, seen)
        if phase.blockers(seen, obj.get("status") or {}) or mine:
            return GOING
        if not seen.released:
            # From here on workers may be gone, and cannot be asked: what was found is written down first.
            self._tell(obj | {"status": after}, phase.release(seen))
        for name, each in there.items():
            self._api.delete(name, uid=each["metadata"]["uid"])
        label = node_label(metadata["uid"])
        for node in self._api.list("v1", "Node", labels=label):
            self._mark_node(node, metadata["uid"], dirty=False)
            self._label(node["metadata"]["name"], label, None)
        pods = self._api.list(
            "v1", "Pod", namespace=self._release.namespace, labels=f"{UID_LABEL}={metadata['uid']}"
        )
        if there or pods:
            return GOING
        fresh = self._api.get(Name(OURS, "Dataset", key.namespace, key.name))
        if fresh is not None and fresh["metadata"]["uid"] == metadata["uid"]:
            left = [each for each in fresh["metadata"].get("finalizers") or () if each != FINALIZER]
            self._api.finalizers(fresh, left)
        for name in list(self._applied):
            if name == claim or metadata["uid"] in name.name:
                self._applied.pop(name, None)
        self._late.pop(key, None)
        self._marked.pop(metadata["uid"], None)
        self._judged.pop(key, None)
        self._swept.pop(metadata["uid"], None)
        return None

    def _seen_going(self, key: Key, obj: Object, there: Mapping[Name, Object], *, claimed: bool) -> Observed:
        label = node_label(obj["metadata"]["uid"])
        labelled = {each["metadata"]["name"] for each in self._api.list("v1", "Node", labels=f"{label}=true")}
        figures = self._figures(obj, self._asking.pods(obj["metadata"]["uid"]))
        # Without the claim none can begin; but who took its protection away did not end those that run.
        users = [
            f"{key.namespace}/{pod['metadata']['name']}"
            for pod in self._api.list("v1", "Pod", namespace=key.namespace)
            if key.name in claims_of(pod) and (claimed or pod["status"].get("phase") == "Running")
        ]
        return Observed(
            generation=obj["metadata"]["generation"],
            writable=_writable(obj),
            claim="Bound" if claimed else "",
            workers=self._workers(obj),
            figures=tuple(figures),
            silent=tuple(sorted(labelled - {each.node for each in figures})),
            deleting=True,
            users=tuple(users),
            accept_loss=(obj["metadata"].get("annotations") or {}).get(phase.ACCEPT_LOSS) == "true",
            released=phase.was_released(obj.get("status") or {}),
        )


class _Lack(NamedTuple):
    """What of that which lies beside a Dataset will not do: reason, and sentence; both empty for nothing."""

    reason: str
    message: str
    later: bool = False
    """Whether the change of its workers has to wait."""


def _may_have(node: Object, spec: DatasetSpec) -> bool:
    """Whether the Dataset's nodeAffinity lets `node` have a worker."""
    metadata = node["metadata"]
    return spec.node_affinity is None or fits(
        Node(metadata["name"], metadata.get("labels") or {}), spec.node_affinity
    )


def _why(workers: list[Object], node: str) -> str:
    """Why the worker of `node` does not answer, as its pod tells."""
    for pod in workers:
        if _node_of(pod) != node:
            continue
        status = pod.get("status") or {}
        for condition in status.get("conditions") or ():
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return str(condition.get("message") or condition.get("reason"))
        for container in status.get("containerStatuses") or ():
            waits = (container.get("state") or {}).get("waiting") or {}
            if waits:
                said = _last_words(container) or waits.get("message")
                return " ".join(filter(None, (waits.get("reason"), said)))
        return "its pod runs, and does not answer" if status.get("podIP") else "its pod starts"
    return "it has no pod"


def _ended(pod: Object) -> str:
    """Where a worker ended and has not come up since, and what it said; empty for one that is up."""
    for container in (pod.get("status") or {}).get("containerStatuses") or ():
        # Whether it waits, or tries again just now, makes no difference: else the status would swing.
        if not container.get("ready") and (said := _last_words(container)):
            return f"node {_node_of(pod)}: {said}"
    return ""


def _last_words(container: Mapping[str, Any]) -> str:
    """The last line that a container wrote before it ended; empty where it did not end, or in silence."""
    ended = (container.get("lastState") or {}).get("terminated") or {}
    lines = [line.strip() for line in str(ended.get("message") or "").splitlines()]
    return redact(next((line for line in reversed(lines) if line), ""))[:500]


def _node_of(pod: Mapping[str, Any]) -> str:
    """The node that a pod of a DaemonSet is for, whether or not it was placed there."""
    if node := pod["spec"].get("nodeName"):
        return str(node)
    affinity = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    for term in required.get("nodeSelectorTerms") or ():
        for field in term.get("matchFields") or ():
            return str(field["values"][0])
    return ""


def claims_of(pod: Mapping[str, Any]) -> set[str]:
    """The claims that `pod` uses, unless it has ended."""
    if (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return set()
    volumes = (pod.get("spec") or {}).get("volumes") or ()
    return {each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each}


def _ours(obj: Mapping[str, Any], uid: str) -> bool:
    return (obj["metadata"].get("labels") or {}).get(UID_LABEL) == uid


def _writable(obj: Mapping[str, Any]) -> bool:
    """By the object itself: what it holds is to be kept, whether or not the rest of its spec can be done."""
    modes = (obj.get("spec") or {}).get("accessModes")
    return isinstance(modes, list) and WRITE in modes


def _final(error: ClusterError) -> bool:
    """Whether trying again would be told the same."""
    return error.status in (400, 403, 409, 413, 422) and not isinstance(error, Conflicting)


def _version(obj: Mapping[str, Any]) -> str:
    return str(obj["metadata"].get("resourceVersion"))


def _within(wanted: Any, there: Any) -> bool:
    """Whether all that `wanted` says stands in `there`, which may say more (what the API fills in), and
    leaves out texts that are empty."""
    if isinstance(wanted, Mapping):
        return isinstance(there, Mapping) and all(
            _within(value, there.get(key, "" if value == "" else None)) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return isinstance(there, list) and len(wanted) == len(there) and all(map(_within, wanted, there))
    return bool(wanted == there) and type(wanted) is type(there)
