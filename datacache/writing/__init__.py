"""
The write path: what is written lands here, is durable at once, and reaches the bucket later.

`overlay` is the index of a writable data set, `landing` keeps bytes, `journal` what is owed to the
bucket, `schedule` decides what may be sent, `uploader` sends it. Nothing of the read path takes a
lock of these. Next: docs/design/2026-11-26-the-write-path.md.
"""
