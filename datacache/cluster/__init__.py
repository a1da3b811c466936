"""
What other processes may ask of a worker.

`control` is the seam: status, load jobs, evict, stat. `server` offers it over HTTP on a Unix socket
(0600); `client` speaks to it; `registry` finds the socket of a mount, a data set or a cache
directory. `metrics` renders the same status for Prometheus.
"""
