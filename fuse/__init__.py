"""
The node daemon: a data set as a mounted directory.

`filesystem` is lookup, getattr, readdir, open, read as plain synchronous functions on plain values;
it knows no driver. `nodes` keeps what a FUSE node names: one version of one path. `pyfuse` is the
portable driver on pyfuse3: decode, one call, encode. `mountpoint` knows mounts, stale mounts and
their readahead. `python -m fuse` is the daemon that `datacache mount` starts.
"""
