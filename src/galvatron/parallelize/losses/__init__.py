"""From the last hidden states to a share of the loss, with a vocabulary that may be cut."""
