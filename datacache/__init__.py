"""
datacache: a tiered cache in front of object storage, shown as a local directory.

The folder listing is the architecture; dependencies point downwards, and import-linter says so.

    cli         one module a command
    worker      composition root: builds everything below from settings; starts and stops it
    cluster     what other processes may ask of a worker (control API over HTTP)
    reading     range -> blocks -> bytes; readahead; prewarm
    index       what exists: paths, sizes, versions; lists lazily or is a pinned snapshot
    cache       where copies live: tiers, what is present in them, whom to evict
    sources     where original bytes live: S3, GCS, Azure, OSS, HTTP, files, anything of fsspec
    config      settings; the only reader of environment and configuration files
    model       frozen values that all of the above speak
    errors  telemetry  clock

`fuse` (the mount) stands on this package and is imported by nothing in it.
"""
