"""A model divided among devices: one process has the requests and the first device, the others only run."""
