"""One module a command: parse, make one call, print. `main` maps errors to exit codes."""
