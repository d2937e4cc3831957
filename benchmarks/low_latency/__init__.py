"""Parts of bench_low_latency.py."""
