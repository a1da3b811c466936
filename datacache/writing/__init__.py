"""
The write path: what is written lands here, is durable at once, and reaches the bucket later.

`overlay` is the index of a writable data set, `landing` keeps bytes, `journal` (in memory: `ledger`) what
is dirty and owed to the bucket, `owing` adds to that and `settling` takes away, `schedule` decides what may
be sent, `uploader` has it sent. Nothing of the read path takes a
lock of these. Next: docs/design/2026-11-26-the-write-path.md.
"""
