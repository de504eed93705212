"""(package docstring to be written: what it takes, gives, and does not know)"""
