"""
Where copies live. Knows keys, bytes and quotas; knows no store.

`tier` is the seam. `directory` implements it (tmpfs or SSD); `tiered` is a tier made of tiers;
`memory` is the public fake. `catalogue` records what is present in a directory and its checksums;
`policy` decides, purely, whom to admit and whom to evict; `verify` is the oracle.
"""
