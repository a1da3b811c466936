"""
Settings: what may be chosen, and the only place that reads files, flags and the environment.

`settings` holds the frozen dataclasses, one sentence a field; `parsing` makes them from flags, a
`datacache.yaml` and the environment, and refuses what is wrong with one line. Everything below is
handed its settings and never looks for them. Flags, YAML keys and fields carry the same names.
"""
