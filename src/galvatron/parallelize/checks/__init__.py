"""What must hold before anything is changed or sent: the model, the batch, the surroundings, the other ranks."""
