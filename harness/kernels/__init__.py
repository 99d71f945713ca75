"""`bench kernels`: one operation at a time, each backend side by side, against the roofline."""
