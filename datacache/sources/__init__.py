"""
Where original bytes live.

`source` is the seam: list, stat, read. `objectstore` (door to obstore), `aws` (door to botocore:
credentials that renew, listings, keys that obstore cannot name), `filesystem` (door to fsspec;
ossfs among its schemes) and `local` implement it; `memory` is the public fake. `checked`
(every answer is held against what was asked) and `steady` (retries, stalls, breaker) are sources
around a source, as is `faulty` (scripted faults). `sink` is the other seam: put, copy, delete, find;
`s3upload`, `local` and `memory` implement it. `opening` makes the right stack from a URI.
"""
