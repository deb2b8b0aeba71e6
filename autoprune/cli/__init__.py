"""The command line: verbs, rendering and exit codes."""
