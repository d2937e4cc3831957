"""`python -m deep_ep tune`: how few SMs communication can do with, alone and beside the GEMMs of a training step.

`measure` takes the times, `choose` picks the budgets, `report` shows them; `deep_ep.tuning` keeps the tables and looks
budgets up.
"""
