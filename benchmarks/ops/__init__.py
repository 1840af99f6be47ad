"""One file an op, bench_<op>.py, and the peers that several of them share."""
