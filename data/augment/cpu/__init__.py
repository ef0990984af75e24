"""On CPUs: loops that numba compiles."""
