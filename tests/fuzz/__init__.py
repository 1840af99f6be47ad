"""The project's own hostile tester: random calls, models and files against oracles.

    make fuzz SECONDS=60 SEED=7 BACKENDS=eager,cpp

A case is a JSON object, from which everything about a call follows. A lane makes cases and runs
them: one for each backend, one for models and layers, one for files. Workers, processes that may
crash, run the cases; the supervisor sees how each one ends, and makes a failing case smaller.
"""
