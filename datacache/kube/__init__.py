"""
The operator: what a `Dataset` object says, which objects should exist for it, and how it is doing.

`spec` reads an object, `manifests` says what should exist, `phase` what its status should say: plain values
in, plain values out, no I/O. `controller` asks the API and does what they say.
"""
