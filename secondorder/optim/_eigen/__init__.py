"""What EigenAdam is made of; nothing else uses it."""
