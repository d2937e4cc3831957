"""What this machine offers to deep_ep, and what to change: `python -m deep_ep doctor`.

`collect.diagnose` gathers facts (`facts`) without creating a CUDA context in this process, chooses the engine and lists
findings (`advice`); `report` prints them. A fact that cannot be had is an `Unknown` with its reason, and never keeps
the others from being gathered.
"""
