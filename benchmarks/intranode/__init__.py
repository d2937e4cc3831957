"""The parts of bench_intranode.py: ranks and clocks, inputs, what is timed, limits of the hardware, the report."""
