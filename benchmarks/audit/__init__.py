"""Compilers asked about kernels: these programs look at compiled code and time nothing."""
