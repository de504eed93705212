"""Records, units and errors that every other package shares.

Takes JSON and TOML text; gives validated, frozen records.  Knows nothing of plans, costs or torch.
"""
