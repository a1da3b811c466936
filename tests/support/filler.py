"""
A process that fills a cache directory until it is killed: `python -m tests.support.filler DIR SEED`.

It says what it has done, a line each, when it is done and not before: `filled KEY START STOP` and, for
entries that it never evicts, `synced KEY`; and what it is about to do: `evicted KEY`.
"""

import os
import random
import sys
import threading

from datacache.cache.directory import DirectoryTier, Owner, Rules
from datacache.clock import VirtualClock
from datacache.errors import CacheError
from datacache.model import CacheKey, KiB, MiB
from tests.contract.tier_suite import content, key

BLOCK = 64 * KiB
QUOTA = 24 * MiB
THREADS = 3


def rules() -> Rules:
    return Rules("ssd:x", QUOTA, BLOCK, reserve=0.0, dataset="mine")


def object_of(name: str) -> CacheKey:
    """The size of an object follows from its name."""
    number = int(name.rpartition("/")[2])
    return key(name, (1000, 20 * KiB, 100 * KiB, 5 * BLOCK + 7)[number % 4])


def main() -> None:
    directory, seed = sys.argv[1], sys.argv[2]
    clock = VirtualClock()
    owner = Owner(os.getpid(), "", "")
    tier = DirectoryTier(directory, rules(), owner=owner, clock=clock, keeper=False, boot="one")
    saying = threading.Lock()

    def say(*words: object) -> None:
        with saying:
            print(*words, flush=True)  # noqa: T201 - that is what it is for

    def fill(number: int) -> None:
        chance = random.Random(f"{seed}/{number}")
        for i in range(10_000):
            each = object_of(f"{number}/{chance.randrange(60)}")
            data = content(each)
            start = chance.choice([0, chance.randrange(each.size)])
            stop = chance.choice([each.size, chance.randrange(start, each.size) + 1])
            file = tier.open(each)
            try:
                file.fill(start, data[start:stop])
                say("filled", each.key, start, stop)
            except CacheError:
                pass
            file.close()
            what = chance.random()
            if what < 0.1 and int(each.key.rpartition("/")[2]) >= 20:
                say("evicted", each.key)  # before, lest it dies between the two
                tier.evict(each)
            elif what < 0.15 and tier.store is not None:
                tier.store.catalogue.checkpoint()  # rows become durable, bytes do not
            elif what < 0.18 and number == 0:
                kept = [object_of(f"{n}/{k}") for n in range(THREADS) for k in range(20)]
                before = [(k, tier.ranges(k)) for k in kept]
                clock.advance(10)
                tier.upkeep()
                if tier.stats()[0].state != "broken":
                    for k, ranges in before:
                        for span in ranges:
                            say("synced", k.key, span.start, span.stop)
            if i == 3:
                say("running")

    threads = [threading.Thread(target=fill, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
