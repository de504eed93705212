"""The processes of a run: how they meet, which groups they form, what they send each other."""
