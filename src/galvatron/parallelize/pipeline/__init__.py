"""One stage of the model and the passes that a batch makes through it."""
