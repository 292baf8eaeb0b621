"""The load test: two endpoints in, raw request records, statistics, report and verdict out."""
