"""One file per trace format; `workloads.readers.detect` finds the one a file needs."""
