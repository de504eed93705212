"""Where parameters and gradients are between steps: whole on every replica, or sharded by FSDP2."""
