"""One file for each runtime: how its sessions are opened and timed, without torch where the runtime needs none."""
