"""
The operator: what objects say, which others should exist for them, and how they are doing.

Nouns decide: plain values in, plain values out, no I/O. `spec` and `dataload` read an object, `beside` what
it names, `manifests` says what should exist, `phase` and `dataload` what a status should say, `marks`,
`turns` and `writers` one thing each. What ends in -ing acts: it asks the API and workers, and does what the
nouns say. `controller` is the process, and `api`, `certificates` and it are doors.
"""
