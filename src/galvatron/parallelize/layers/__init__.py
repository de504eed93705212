"""What is done to one layer's modules: cuts along tp, attention, recompute, compilation, what dropout draws."""
