"""
From a range of an object to its bytes.

`plan` turns a range into the spans to fetch (pure); `prefetch` decides what to fetch ahead (pure
state machines); `budget` bounds the memory; `reader` is the only place where a miss becomes a
fetch, one fetch for any number of readers; `load` prewarms.
"""
