"""Measurements of every op and of the models, beside what else computes the same.

In a clone this folder lies beside the package, where adatape_kernels/benchmarks.py leads to it; an
installed package holds it as adatape_kernels/benchmarks.
"""
