"""Parameters as pieces of the whole: filled, gathered, saved and exported."""
